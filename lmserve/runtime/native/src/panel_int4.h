// Weights in 4 bits: 32 numbers along k share a scale and a minimum, w = q * scale + minimum with q in 0..15. That is
// what GGUF's Q4_0 and Q4_1 blocks are, which are taken over as they stand. Activations are 8 bits with a scale for the
// same 32 numbers, so that a group's sum is one integer.
//
// A group in a panel: four lines of bytes, the low halves of line j being the quads of step j, the high halves those of
// step j + 4; then 32 scales and 32 minima in float16. A prepared row: its numbers, then for each group its scale and its
// scale times the sum of its numbers (which the minima are multiplied with).
#pragma once
#include "output.h"
#include "panel_int8.h"

namespace lm {

template <typename T>
inline void prepare_int4(const Weight& w, const T* from, char* to) {
  const int deep = padded_k(INT4, w.k), groups = deep / GROUP;
  int8_t* numbers = reinterpret_cast<int8_t*>(to);
  float* scales = reinterpret_cast<float*>(to + deep);
  for (int g = 0; g < groups; ++g) {
    const int count = std::min(GROUP, w.k - g * GROUP);
    int8_t* group = numbers + g * GROUP;
    const float largest = largest_magnitude(from + g * GROUP, count), scale = largest / 127.0f;
    to_int8(from + g * GROUP, count, largest > 0 ? 127.0f / largest : 0.0f, group);
    for (int i = count; i < GROUP; ++i) group[i] = 0;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < GROUP; ++i) sum += group[i];
    scales[2 * g] = scale;
    scales[2 * g + 1] = scale * float(sum);
  }
}

// M rows times a panel, 16 outputs at a time for a group.
template <int M, bool FETCHES>
inline void rows_int4(const char* rows, size_t pitch, const char* panel, int deep, const Output& out,
                      long row, long first) {
  const __m512i low_half = _mm512_set1_epi8(0x0f);
  __m512 sum[M][2];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
  for (int g = 0; g < deep / GROUP; ++g) {
    const char* group = panel + g * GROUP_BYTES;
    if (FETCHES)
      for (size_t j = 0; j < GROUP_BYTES; j += 64) _mm_prefetch(group + AHEAD + j, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i dot[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) dot[m] = _mm512_setzero_si512();
#pragma GCC unroll 1
      for (int j = 0; j < 4; ++j) {
        const __m512i bytes = _mm512_loadu_si512(group + j * 128 + half * 64);
        const __m512i near = _mm512_and_si512(bytes, low_half);
        const __m512i far = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_half);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          int32_t quad, later;
          std::memcpy(&quad, rows + m * pitch + g * GROUP + 4 * j, 4);
          std::memcpy(&later, rows + m * pitch + g * GROUP + 16 + 4 * j, 4);
          dot[m] = _mm512_dpbusd_epi32(dot[m], near, _mm512_set1_epi32(quad));
          dot[m] = _mm512_dpbusd_epi32(dot[m], far, _mm512_set1_epi32(later));
        }
      }
      const auto halves = [&](int at) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 512 + at * 64 + half * 32)));
      };
      const __m512 scale = halves(0), minimum = halves(1);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        float by[2];
        std::memcpy(by, rows + m * pitch + deep + g * 8, 8);
        const __m512 scaled = _mm512_mul_ps(scale, _mm512_set1_ps(by[0]));
        sum[m][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m]), scaled, sum[m][half]);
        sum[m][half] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(by[1]), sum[m][half]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) out.put(row + m, first, sum[m][0], sum[m][1]);
}

inline void panels_int4(const Weight& w, const char* rows, int m, const Output& out, long begin, long end) {
  const int deep = padded_k(INT4, w.k);
  const size_t pitch = prepared_bytes(w);
  sweep(w, m, begin, end, [&](auto count, auto fetches, long row, const char* panel, long p) {
    rows_int4<count, fetches>(rows + row * pitch, pitch, panel, deep, out, row, p * PANEL);
  });
}

}  // namespace lm
