// The largest logit of each row: what greedy decoding asks of a step, in one pass over the logits as they are.
#include <omp.h>

#include "rows.h"

using namespace lm;

namespace {

// The lowest index of the row's largest number; -1 if a number is none, or the largest is minus infinity.
template <typename T>
int64_t first_largest(const T* row, long count) {
  float largest = -INFINITY;
  int none = 0;
#pragma omp simd reduction(max : largest) reduction(+ : none)
  for (long i = 0; i < count; ++i) {
    const float x = widen(row[i]);
    largest = larger(largest, x);
    none += x != x;
  }
  if (none || !(largest > -INFINITY)) return -1;
  constexpr long BLOCK = 1024;
  for (long begin = 0; begin < count; begin += BLOCK) {
    const long end = begin + BLOCK < count ? begin + BLOCK : count;
    int found = 0;
#pragma omp simd reduction(+ : found)
    for (long i = begin; i < end; ++i) found += widen(row[i]) == largest;
    for (long i = begin; found && i < end; ++i)
      if (widen(row[i]) == largest) return i;
  }
  return -1;
}

}  // namespace

extern "C" void lm_first_largest(const void* logits, int is_bf16, int64_t pitch, int64_t rows, int64_t count,
                                 int64_t* result, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long row = 0; row < rows; ++row)
    result[row] = is_bf16 ? first_largest(static_cast<const bf16*>(logits) + row * pitch, count)
                          : first_largest(static_cast<const float*>(logits) + row * pitch, count);
}
