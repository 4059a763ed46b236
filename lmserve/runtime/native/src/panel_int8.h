// Weights in 8 bits, symmetric, with a scale for each output. Two ways of multiplying, by processor:
//
// With tiles: activations stay bf16. A few panels at a time become bf16 (every integer up to 127 is one exactly) in the
// cache, where all rows meet them; scales come last. Lines are pairs, as in panel_bf16.h. Only weights lose.
//
// Without: activations become 8 bits, too, with a scale for every 64 numbers of a row, as they come, and the processor's
// dot products of bytes do the rest. They multiply unsigned by signed bytes: weights are kept shifted by 128, and sums
// begin with what the shift adds, taken off (128 times the sum of a group of the row's numbers, which costs nothing for
// another output). A prepared row: its numbers, then its scales, then where the sums of its groups begin.
#pragma once
#include <vector>

#include "amx.h"
#include "output.h"
#include "panel_bf16.h"

namespace lm {

template <typename T>
inline float largest_magnitude(const T* numbers, int count) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < count; ++i) largest = larger(largest, std::fabs(widen(numbers[i])));
  return largest;
}

template <typename T>
inline void to_int8(const T* from, int count, float inverse, int8_t* to) {
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const float shifted = widen(from[i]) * inverse + 12582912.0f;  // rounds to the nearest integer, ties to even
    to[i] = int8_t(int32_t(shifted - 12582912.0f));
  }
}


constexpr int SCALED = 64;  // numbers of a row that share a scale
constexpr int SHIFT = 128;  // of weights

template <typename T>
inline void prepare_int8(const Weight& w, const T* from, char* to) {
  const int deep = padded_k(INT8, w.k);
  int8_t* numbers = reinterpret_cast<int8_t*>(to);
  float* scales = reinterpret_cast<float*>(to + deep);
  int32_t* starts = reinterpret_cast<int32_t*>(scales + deep / SCALED);
  for (int i = 0; i < deep; i += SCALED) {
    const int count = std::min(SCALED, w.k - i);
    const float largest = largest_magnitude(from + i, count);
    to_int8(from + i, count, largest > 0 ? 127.0f / largest : 0.0f, numbers + i);
    std::fill(numbers + i + count, numbers + i + SCALED, int8_t(0));
    scales[i / SCALED] = largest / 127.0f;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = i; j < i + SCALED; ++j) sum += numbers[j];
    starts[i / SCALED] = -SHIFT * sum;
  }
}

// M rows times a panel, 16 outputs at a time for a group of numbers: so few sums leave room for many rows.
template <int M, bool FETCHES>
inline void rows_int8(const char* rows, size_t pitch, const char* panel, int deep, const Output& out,
                      long row, long first) {
  const int groups = deep / SCALED;
  __m512 sum[M][2];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
  for (int g = 0; g < groups; ++g) {
    const char* group = panel + size_t(g) * SCALED * PANEL;
    if (FETCHES)
      for (int j = 0; j < SCALED * PANEL; j += 64) _mm_prefetch(group + AHEAD + j, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i dot[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        int32_t start;
        std::memcpy(&start, rows + m * pitch + deep + (groups + g) * 4, 4);
        dot[m] = _mm512_set1_epi32(start);
      }
#pragma GCC unroll 1
      for (int i = 0; i < SCALED; i += 4) {
        const __m512i line = _mm512_loadu_si512(group + i * PANEL + half * 64);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          int32_t quad;
          std::memcpy(&quad, rows + m * pitch + g * SCALED + i, 4);
          dot[m] = _mm512_dpbusd_epi32(dot[m], line, _mm512_set1_epi32(quad));
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        float scale;
        std::memcpy(&scale, rows + m * pitch + deep + g * 4, 4);
        sum[m][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m]), _mm512_set1_ps(scale), sum[m][half]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) out.put(row + m, first, sum[m][0], sum[m][1]);
}

#ifdef LM_AMX
// Pairs of bytes become pairs of bf16, a line at a time.
inline void widen_panel(const char* from, int deep, char* to) {
  for (int i = 0; i < deep / 2; ++i)
    for (int half = 0; half < 2; ++half) {
      const char* line = from + size_t(i) * 64 + half * 32;
      _mm_prefetch(line + AHEAD, _MM_HINT_T0);
      const __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)));
      // Of each pair the first is the lower word.
      const __m512 even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16));
      const __m512 odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(words, 16));
      const __m512i high = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(int(0xffff0000u)));
      const __m512i pair = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), high);
      _mm512_storeu_si512(to + size_t(i) * 128 + half * 64, pair);
    }
}

inline void panels_int8_by_tiles(const Weight& w, const bf16* a, size_t lda, int m, const Output& out, long begin,
                                 long end) {
  const int deep = padded_k(BF16, w.k), together = m > 32 ? PANELS_TOGETHER : 1;
  const size_t bytes = size_t(deep) * PANEL, wide = bytes * 2;
  static thread_local std::vector<char> room;
  room.resize(wide * together + 64 + AHEAD);
  char* panels = room.data() + (64 - reinterpret_cast<size_t>(room.data()) % 64) % 64;
  Tiles tiles;
  for (long group = begin; group < end; group += together) {
    const long last = std::min(end, group + together);
    for (long p = group; p < last; ++p)
      widen_panel(static_cast<const char*>(w.data) + p * bytes, deep, panels + (p - group) * wide);
    for (long row = 0; row < m; row += 32) {
      const int count = int(std::min(32L, m - row)), second = std::max(0, count - 16);
      tiles.configure(count - second, second);
      for (long p = group; p < last; ++p)
        (second ? tiles_bf16<true, false> : tiles_bf16<false, false>)(
            a + row * lda, lda, panels + (p - group) * wide, deep, count, out, row, p * PANEL);
    }
  }
}
#endif

inline void panels_int8(const Weight& w, const char* rows, int m, const Output& out, long begin, long end) {
  const int deep = padded_k(INT8, w.k);
  const size_t pitch = prepared_bytes(w);
  sweep(w, m, begin, end, [&](auto count, auto fetches, long row, const char* panel, long p) {
    rows_int8<count, fetches>(rows + row * pitch, pitch, panel, deep, out, row, p * PANEL);
  });
}

}  // namespace lm
