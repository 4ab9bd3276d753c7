// Strided boxes: from the row-major bytes of a larger box in a buffer to live host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dscheck {

// One dimension of a box: how many steps it has, and how far one is in the buffer and in the target, in bytes.
struct Axis {
  std::size_t count = 0;
  std::ptrdiff_t source = 0;
  std::ptrdiff_t target = 0;
};

// One box on its way, of any number of dimensions. The elements do not overlap in the target.
class Scatter {
 public:
  // `source`: the offset of the first element in the buffer. `axes` go from the outermost to the innermost; none: one
  // element. Dimensions that lie as one in both places are joined.
  Scatter(std::size_t source, std::byte* target, std::size_t element_bytes, std::vector<Axis> axes);

  // One past the last byte that is read of the buffer; 0 for an empty box.
  std::size_t source_end() const noexcept;

  void operator()(const std::byte* buffer) const noexcept;

 private:
  std::size_t source_;
  std::byte* target_;
  std::size_t row_bytes_;  // what lies side by side in both places
  std::vector<Axis> axes_;
};

}  // namespace dscheck
