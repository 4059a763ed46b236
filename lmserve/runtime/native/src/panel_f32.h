// Weights in float32: k lines of 32 floats.
#pragma once
#include "output.h"

namespace lm {

template <int M>
inline void rows_f32(const float* a, size_t lda, const float* panel, int k, const Output& out, long row, long first) {
  __m512 low[M], high[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) low[m] = high[m] = _mm512_setzero_ps();
  for (int i = 0; i < k; ++i) {
    const __m512 left = _mm512_loadu_ps(panel + i * PANEL), right = _mm512_loadu_ps(panel + i * PANEL + 16);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const __m512 x = _mm512_set1_ps(a[m * lda + i]);
      low[m] = _mm512_fmadd_ps(x, left, low[m]);
      high[m] = _mm512_fmadd_ps(x, right, high[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) out.put(row + m, first, low[m], high[m]);
}

inline void panels_f32(const Weight& w, const float* a, size_t lda, int m, const Output& out, long begin, long end) {
  const size_t floats = panel_bytes(F32, w.k) / 4;
  for (long p = begin; p < end; ++p) {
    const float* panel = static_cast<const float*>(w.data) + p * floats;
    long row = 0;
    for (; row + 8 <= m; row += 8) rows_f32<8>(a + row * lda, lda, panel, w.k, out, row, p * PANEL);
    for (; row + 2 <= m; row += 2) rows_f32<2>(a + row * lda, lda, panel, w.k, out, row, p * PANEL);
    for (; row < m; ++row) rows_f32<1>(a + row * lda, lda, panel, w.k, out, row, p * PANEL);
  }
}

}  // namespace lm
