// Weights in bfloat16: lines of 32 pairs. Sums are float32.
#pragma once
#include "amx.h"
#include "output.h"

namespace lm {

// Two sums a register, of even and of odd pairs, so that one row alone keeps the multipliers busy.
template <int M, bool FETCHES>
inline void rows_bf16(const bf16* a, size_t lda, const char* panel, int deep, const Output& out,
                      long row, long first) {
  __m512 sum[2][M][2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[h][m][0] = sum[h][m][1] = _mm512_setzero_ps();
  for (int i = 0; i < deep; i += 4) {
    const char* line = panel + size_t(i) * PANEL * 2;
    if (FETCHES)
#pragma GCC unroll 4
      for (int j = 0; j < 256; j += 64) _mm_prefetch(line + AHEAD + j, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512bh left = (__m512bh)_mm512_loadu_si512(line + h * 128);
      const __m512bh right = (__m512bh)_mm512_loadu_si512(line + h * 128 + 64);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        int32_t pair;
        std::memcpy(&pair, a + m * lda + i + 2 * h, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        sum[h][m][0] = _mm512_dpbf16_ps(sum[h][m][0], x, left);
        sum[h][m][1] = _mm512_dpbf16_ps(sum[h][m][1], x, right);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    out.put(row + m, first, _mm512_add_ps(sum[0][m][0], sum[1][m][0]), _mm512_add_ps(sum[0][m][1], sum[1][m][1]));
}

#ifdef LM_AMX
// Up to 32 rows times a panel; the tiles are configured for these rows.
template <bool TWO, bool FETCH>
inline void tiles_bf16(const bf16* a, size_t lda, const char* panel, int deep, int count, const Output& out, long row,
                       long first) {
  _tile_zero(0);
  _tile_zero(1);
  if (TWO) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < deep; i += 32) {
    const char* lines = panel + size_t(i) * PANEL * 2;
    if (FETCH)
#pragma GCC unroll 32
      for (int j = 0; j < 32; ++j) _mm_prefetch(lines + AHEAD + j * 64, _MM_HINT_T0);
    _tile_loadd(4, a + i, lda * 2);
    _tile_loadd(6, lines, 128);
    _tile_loadd(7, lines + 64, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (TWO) {
      _tile_loadd(5, a + 16 * lda + i, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float results[32][PANEL];
  _tile_stored(0, results[0], PANEL * 4);
  _tile_stored(1, results[0] + 16, PANEL * 4);
  if (TWO) {
    _tile_stored(2, results[16], PANEL * 4);
    _tile_stored(3, results[16] + 16, PANEL * 4);
  }
  for (int r = 0; r < count; ++r) out.put(row + r, first, _mm512_load_ps(results[r]), _mm512_load_ps(results[r] + 16));
}
#endif

constexpr int PANELS_TOGETHER = 8;  // a block of rows meets so many panels before the next block comes

inline void panels_bf16(const Weight& w, const bf16* a, size_t lda, int m, const Output& out, long begin, long end) {
  const int deep = padded_k(BF16, w.k);
#ifdef LM_AMX
  if (w.use_amx) {
    const size_t bytes = panel_bytes(BF16, w.k);
    const char* data = static_cast<const char*>(w.data);
    Tiles tiles;
    for (long group = begin; group < end; group += PANELS_TOGETHER)
      for (long row = 0; row < m; row += 32) {
        const int count = int(std::min(32L, m - row)), second = std::max(0, count - 16);
        tiles.configure(count - second, second);
        for (long p = group; p < std::min(end, group + PANELS_TOGETHER); ++p) {
          // The first rows bring a panel from memory, the others find it in the cache.
          const auto kernel = second ? row ? tiles_bf16<true, false> : tiles_bf16<true, true>
                                     : row ? tiles_bf16<false, false> : tiles_bf16<false, true>;
          kernel(a + row * lda, lda, data + p * bytes, deep, count, out, row, p * PANEL);
        }
      }
    return;
  }
#endif
  sweep(w, m, begin, end, [&](auto count, auto fetches, long row, const char* panel, long p) {
    rows_bf16<count, fetches>(a + row * lda, lda, panel, deep, out, row, p * PANEL);
  });
}

}  // namespace lm
