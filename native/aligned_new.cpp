// operator new[] whose large arrays begin on a cache line.
//
// ggml-cpu takes its work buffer with new[]. malloc's 16 bytes of alignment have its kernels' 64-byte
// loads cross two cache lines, most of the time: flash attention is a fifth slower then. The standard
// lets a program replace this function; the memory is free()'s as before.

#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kLarge = 64 << 10;

}  // namespace

void *operator new[](std::size_t size) {
  if (size >= kLarge && size <= SIZE_MAX - kCacheLine) {
    const std::size_t lines = (size + kCacheLine - 1) / kCacheLine;
    if (void *array = std::aligned_alloc(kCacheLine, lines * kCacheLine)) return array;
  }
  return ::operator new(size);
}
