#include <cstdio>
#include <exception>

#include "check.h"

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // a sanitizer that ends the process flushes nothing
  int failed = 0;
  for (const auto& [name, run] : dscheck::test::cases()) {
    const auto began = std::chrono::steady_clock::now();
    try {
      run();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
      std::printf("ok      %s, %.2f s\n", name, took.count());
    } catch (const std::exception& error) {
      std::printf("FAILED  %s: %s\n", name, error.what());
      ++failed;
    }
  }
  return failed == 0 ? 0 : 1;
}
