// Where the results of a panel go.
#pragma once
#include <immintrin.h>

#include "rows.h"

namespace lm {

struct Output {
  void* data;
  int type;       // T_F32 or T_BF16
  size_t pitch;   // elements
  int n;
  const float* bias;
  const float* scales;  // of each output, or null

  // 32 results of one row, of the panel that begins at output `first`; what is beyond n is dropped.
  void put(long row, long first, __m512 low, __m512 high) const {
    if (scales) {
      low = _mm512_mul_ps(low, _mm512_loadu_ps(scales + first));
      high = _mm512_mul_ps(high, _mm512_loadu_ps(scales + first + 16));
    }
    if (bias) {
      low = _mm512_add_ps(low, _mm512_loadu_ps(bias + first));
      high = _mm512_add_ps(high, _mm512_loadu_ps(bias + first + 16));
    }
    const long left = n - first;
    const uint32_t there = left >= 32 ? 0xffffffffu : (1u << left) - 1;
    if (type == 0) {
      float* to = static_cast<float*>(data) + row * pitch + first;
      _mm512_mask_storeu_ps(to, __mmask16(there), low);
      _mm512_mask_storeu_ps(to + 16, __mmask16(there >> 16), high);
    } else {
      bf16* to = static_cast<bf16*>(data) + row * pitch + first;
      _mm512_mask_storeu_epi16(to, there, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
};

}  // namespace lm
