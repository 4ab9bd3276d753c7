// The three kernels of a capture. Built by hand into kernels.ptx, which the driver compiles for the GPU it runs on, so
// that no build of dscheck needs a CUDA compiler:
//   nvcc -ptx -arch=compute_75 -O3 csrc/cuda/kernels.cu -o csrc/cuda/kernels.ptx
// and the .version line lowered to 7.0, since nothing newer is used and older drivers then take it.
// A table entry says where a piece lies, how long it is, and where its result goes.

struct Entry {
  unsigned long long source, bytes, target;
};

// Copies `count` units of one width, shared by all threads of a row.
template <typename Unit>
__device__ void copy_units(const unsigned char* source, unsigned char* target, unsigned long long count) {
  const unsigned long long stride = (unsigned long long)gridDim.y * blockDim.x;
  for (unsigned long long i = (unsigned long long)blockIdx.y * blockDim.x + threadIdx.x; i < count; i += stride)
    reinterpret_cast<Unit*>(target)[i] = reinterpret_cast<const Unit*>(source)[i];
}

// Copies pieces: small tensors into page-locked host memory, or large ones to spill memory. `target` is a byte offset
// in `out`, or an address when `out` is null, and a multiple of 16. One row of blocks an entry.
extern "C" __global__ void dscheck_gather(const Entry* table, unsigned char* out) {
  const Entry entry = table[blockIdx.x];
  const unsigned char* source = reinterpret_cast<const unsigned char*>(entry.source);
  unsigned char* target = reinterpret_cast<unsigned char*>(reinterpret_cast<unsigned long long>(out) + entry.target);
  const unsigned long long width = entry.source % 16 == 0 ? 16 : entry.source % 4 == 0 ? 4 : 1;
  const unsigned long long whole = entry.bytes / width * width;
  if (width == 16) {
    copy_units<uint4>(source, target, entry.bytes / 16);
  } else if (width == 4) {
    copy_units<unsigned>(source, target, entry.bytes / 4);
  }
  const unsigned long long done = width == 1 ? 0 : whole;
  copy_units<unsigned char>(source + done, target + done, entry.bytes - done);
}

// 256 bytes of each piece, as take_sample() in csrc/core/sample.h: one block of 256 threads an entry; `target` counts
// samples of 256 bytes in `out`.
extern "C" __global__ void dscheck_sample(const Entry* table, unsigned char* out) {
  const Entry entry = table[blockIdx.x];
  const unsigned long long index = threadIdx.x;
  unsigned long long offset = index;
  if (entry.bytes > 256 && index >= 64) {
    const unsigned long long inner = (entry.bytes - 128) / 4;
    offset =
        index >= 192 ? entry.bytes - 256 + index : 64 + ((index - 64) / 4 * inner / 32 + inner / 64) * 4 + index % 4;
  }
  const bool inside = offset < entry.bytes;
  out[entry.target * 256 + index] = inside ? reinterpret_cast<const unsigned char*>(entry.source)[offset] : 0;
}

__device__ unsigned long long mix_word(unsigned long long word, unsigned long long index) {
  unsigned long long h = word ^ (index * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull);
  h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
  h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
  return h ^ (h >> 31);
}

// hash_words() of csrc/core/sample.h in gridDim.y parts for each entry, which the host adds up: part y of an entry goes
// to out[target * gridDim.y + y].
extern "C" __global__ void dscheck_hash(const Entry* table, unsigned long long* out) {
  __shared__ unsigned long long sums[256];
  const Entry entry = table[blockIdx.x];
  const unsigned char* source = reinterpret_cast<const unsigned char*>(entry.source);
  const unsigned long long words = (entry.bytes + 7) / 8;
  unsigned long long sum = 0;
  for (unsigned long long i = (unsigned long long)blockIdx.y * 256 + threadIdx.x; i < words; i += 256ull * gridDim.y) {
    unsigned long long word = 0;
    if (entry.source % 8 == 0 && i * 8 + 8 <= entry.bytes) {
      word = reinterpret_cast<const unsigned long long*>(source)[i];
    } else {
      for (unsigned long long byte = 0; byte < 8 && i * 8 + byte < entry.bytes; ++byte)
        word |= (unsigned long long)source[i * 8 + byte] << (8 * byte);
    }
    sum += mix_word(word, i);
  }
  sums[threadIdx.x] = sum;
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[entry.target * gridDim.y + blockIdx.y] = sums[0];
}
