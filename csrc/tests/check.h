// What a test of the core is written with: TEST(a_fact) { CHECK(...); }. main.cpp runs them in their order.
#pragma once

#include <chrono>
#include <cstdint>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace dscheck::test {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registered {
  Registered(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

// Of what C++ gives us to print; anything else shows as nothing.
template <typename Value>
std::string shown(const Value& value) {
  std::ostringstream out;
  if constexpr (requires { out << value; }) out << value;
  return out.str();
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <typename Found, typename Expected>
void check_equal(const Found& found, const Expected& expected, const char* file, int line, const char* what) {
  if (found == expected) return;
  fail(file, line, std::string(what) + ": " + shown(found) + " found, " + shown(expected) + " expected");
}

using Random = std::mt19937_64;

// From `least` to `most`, both included.
inline std::size_t between(Random& random, std::size_t least, std::size_t most) {
  return std::uniform_int_distribution<std::size_t>(least, most)(random);
}

inline std::vector<std::byte> random_bytes(Random& random, std::size_t count) {
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

// As a deadline: long enough for a sanitizer on a busy machine.
inline std::chrono::steady_clock::time_point soon() {
  return std::chrono::steady_clock::now() + std::chrono::seconds(60);
}

}  // namespace dscheck::test

#define TEST(name)                                                       \
  static void name();                                                    \
  static const dscheck::test::Registered registered_##name(#name, name); \
  static void name()

#define CHECK(condition)                                                               \
  do {                                                                                 \
    if (!(condition)) dscheck::test::fail(__FILE__, __LINE__, #condition " is false"); \
  } while (false)

#define CHECK_EQUAL(found, expected) \
  dscheck::test::check_equal(found, expected, __FILE__, __LINE__, #found " == " #expected)
