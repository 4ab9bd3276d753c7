// A file for a test, on a disk and in memory.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"

namespace dscheck::test {

// A file of the test's own in `folder`, gone at its end.
class File {
 public:
  explicit File(const std::string& folder) : path_(folder + "/dscheck-test-XXXXXX"), file_(mkstemp(path_.data())) {
    if (file_ < 0) throw Failure(path_ + ": " + std::strerror(errno));
  }
  ~File() {
    close(file_);
    unlink(path_.c_str());
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int descriptor() const { return file_; }

 private:
  std::string path_;
  int file_;
};

// Where direct I/O may be possible, and where it may not.
inline std::vector<std::string> folders() {
  const char* const given = std::getenv("TMPDIR");
  return {given != nullptr ? given : "/tmp", "/dev/shm"};
}

}  // namespace dscheck::test
