// Attention's two inner loops in AVX-512 with bf16 products, and AMX where there is one. See attention.h.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "amx.h"
#include "rows.h"

namespace lm {

constexpr int KEY_BLOCK = 64;
constexpr int LANES = 16;
constexpr int STRIP = 32;  // columns of a prompt's queries that are in the nearest cache together
constexpr int COMING = 64;  // keys or values that a decode asks for before it reads them
constexpr int PACKS = 3;   // blocks of keys and values that are at hand
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float MUCH_LARGER = 8;  // powers of two that a weight may be above 1

inline __m512 widen16(const bf16* numbers) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline void narrow16(bf16* to, __m512 numbers) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(numbers));
}

// 2^x for x below 127, within 3e-6 of it: Taylor's series on [-1/2, 1/2]. Results below the smallest normal number are 0.
inline __m512 power_of_two16(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ), p, n);
}

inline __m512 capped16(__m512 scores, float softcap) {
  if (softcap <= 0) return scores;
  alignas(64) float numbers[LANES];
  _mm512_store_ps(numbers, scores);
  for (float& number : numbers) number = softcap * hyperbolic_tangent(number / softcap);
  return _mm512_load_ps(numbers);
}

// Lane j of the result is the sum of all lanes of part[j].
inline __m512 sums_of_lanes(const __m512* part) {
  __m512 pairs[8], quads[4];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(part[2 * i], part[2 * i + 1]),
                             _mm512_unpackhi_ps(part[2 * i], part[2 * i + 1]));
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                                   _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
                                    _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// Transposes 16 rows of 16 pairs: row j of `from` (any distance apart) becomes column j of `to` (`pitch` pairs a row).
inline void transpose_pairs(const bf16* const* from, long offset, uint32_t* to, long pitch) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from[i] + offset);
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_storeu_si512(to + i * pitch, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(to + (i + 8) * pitch, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(to + (i + 4) * pitch, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_storeu_si512(to + (i + 12) * pitch, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
}

// c (M rows, WIDTH * 16 columns) = or += a (M rows of `pairs` pairs) times b (`pairs` rows of pairs).
template <int M, int WIDTH>
inline void small_product(const bf16* a, long a_pitch, const uint32_t* b, long b_pitch, int pairs, float* c, long c_pitch,
                          bool add) {
  __m512 sum[M][WIDTH];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH; ++j)
      sum[m][j] = add ? _mm512_loadu_ps(c + m * c_pitch + j * LANES) : _mm512_setzero_ps();
  for (int p = 0; p < pairs; ++p) {
    __m512bh row[WIDTH];
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH; ++j) row[j] = (__m512bh)_mm512_loadu_si512(b + p * b_pitch + j * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, a + m * a_pitch + 2 * p, 4);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 16
      for (int j = 0; j < WIDTH; ++j) sum[m][j] = _mm512_dpbf16_ps(sum[m][j], left, row[j]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH; ++j) _mm512_storeu_ps(c + m * c_pitch + j * LANES, sum[m][j]);
}

template <int WIDTH>
inline void product_of_rows(int rows, const bf16* a, long a_pitch, const uint32_t* b, long b_pitch, int pairs, float* c,
                            long c_pitch, bool add) {
  int m = 0;
  for (; m + 6 <= rows; m += 6)
    small_product<6, WIDTH>(a + m * a_pitch, a_pitch, b, b_pitch, pairs, c + m * c_pitch, c_pitch, add);
  for (; m + 2 <= rows; m += 2)
    small_product<2, WIDTH>(a + m * a_pitch, a_pitch, b, b_pitch, pairs, c + m * c_pitch, c_pitch, add);
  for (; m < rows; ++m)
    small_product<1, WIDTH>(a + m * a_pitch, a_pitch, b, b_pitch, pairs, c + m * c_pitch, c_pitch, add);
}

#ifdef LM_AMX
// The same for multiples of 32 rows and columns, with tiles of 16 rows each.
inline void product_of_tiles(int rows, int columns, const bf16* a, long a_pitch, const uint32_t* b, long b_pitch,
                             int pairs, float* c, long c_pitch, bool add) {
  for (int r = 0; r < rows; r += 32)
    for (int j = 0; j < columns; j += 32) {
      float *top = c + r * c_pitch + j, *bottom = top + 16 * c_pitch;
      if (add) {
        _tile_loadd(0, top, c_pitch * 4);
        _tile_loadd(1, top + 16, c_pitch * 4);
        _tile_loadd(2, bottom, c_pitch * 4);
        _tile_loadd(3, bottom + 16, c_pitch * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int p = 0; p < pairs; p += 16) {
        _tile_loadd(4, a + r * a_pitch + 2 * p, a_pitch * 2);
        _tile_loadd(5, a + (r + 16) * a_pitch + 2 * p, a_pitch * 2);
        _tile_loadd(6, b + p * b_pitch + j, b_pitch * 4);
        _tile_loadd(7, b + p * b_pitch + j + 16, b_pitch * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, top, c_pitch * 4);
      _tile_stored(1, top + 16, c_pitch * 4);
      _tile_stored(2, bottom, c_pitch * 4);
      _tile_stored(3, bottom + 16, c_pitch * 4);
    }
}
#endif

struct Bf16Attention {
  const bf16 *k_cache, *v_cache;
  const int32_t* table;
  int block_size, kv_heads, kv_head, group, dk, dv, window;
  float scaling, softcap;
  const float* sinks;
  bool use_amx;

  float sink(int g) const { return sinks ? sinks[kv_head * group + g] : -INFINITY; }
  int first_seen(int position) const { return window ? std::max(0, position + 1 - window) : 0; }

  // Where the cache keeps [begin, begin + count).
  void find_slots(int begin, int count, uint32_t* slots) const {
    for (int j = 0; j < count;) {
      const int block = (begin + j) / block_size, end = std::min(count, (block + 1) * block_size - begin);
      const uint32_t first = uint32_t(table[block]) * block_size + (begin + j) % block_size;
      for (const int from = j; j < end; ++j) slots[j] = first + (j - from);
    }
  }

  // One query of each head: q (group, dk) -> out (group, dv). What this thread reads next is fetched meanwhile: an item
  // alone is too short for its own memory to come in beside its arithmetic.
  void decode(const bf16* q, bf16* out, int position, const Bf16Attention* next, int next_position,
              std::vector<float>& scratch) const {
    const int begin = first_seen(position), count = position + 1 - begin, padded = (count + LANES - 1) / LANES * LANES;
    const int next_begin = next ? next->first_seen(next_position) : 0;
    const int next_count = next ? std::min(padded, next_position + 1 - next_begin) : 0;
    scratch.resize(size_t(group + 2) * padded + group + 4 * COMING);
    float *scores = scratch.data(), *totals = scores + size_t(group) * padded;
    uint32_t *slots = reinterpret_cast<uint32_t*>(totals + group), *next_slots = slots + padded + COMING;
    find_slots(begin, count, slots);
    std::fill(slots + count, slots + padded + COMING, slots[count - 1]);
    if (next) next->find_slots(next_begin, next_count, next_slots);
    for (int at = 0; at < padded; at += LANES) {
      for (int j = at; j < std::min(next_count, at + LANES); ++j)
        for (int d = 0; d < dk; d += 32)
          _mm_prefetch(k_cache + (size_t(next_slots[j]) * kv_heads + next->kv_head) * dk + d, _MM_HINT_T1);
      score(q, slots + at, std::min(LANES, count - at), scores + at, padded);
    }
    for (int g = 0; g < group; ++g) totals[g] = softmax(scores + size_t(g) * padded, padded, sink(g));
    for (int g = 0; g < group;) {
      const int take = std::min(group - g, 6);
      for (int d = 0; d < dv; d += 2 * LANES) {
        const bf16* fetched = next && g == 0 ? v_cache + next->kv_head * dv + d : nullptr;
        const Coming coming{fetched, next_slots, fetched ? next_count : 0};
        switch (take) {
          case 1: weigh<1>(scores, padded, slots, count, totals, g, d, coming, out); break;
          case 2: weigh<2>(scores, padded, slots, count, totals, g, d, coming, out); break;
          case 3: weigh<3>(scores, padded, slots, count, totals, g, d, coming, out); break;
          case 4: weigh<4>(scores, padded, slots, count, totals, g, d, coming, out); break;
          case 5: weigh<5>(scores, padded, slots, count, totals, g, d, coming, out); break;
          default: weigh<6>(scores, padded, slots, count, totals, g, d, coming, out);
        }
      }
      g += take;
    }
  }

  struct Coming {  // values to be fetched
    const bf16* values;
    const uint32_t* slots;
    int count;
  };

  // The keys in 16 slots, `count` of them real, against every head's query. Later ones are fetched meanwhile.
  void score(const bf16* q, const uint32_t* slots, int count, float* scores, long pitch) const {
    const bf16* keys[LANES];
    for (int j = 0; j < LANES; ++j) {
      keys[j] = k_cache + (size_t(slots[j]) * kv_heads + kv_head) * dk;
      const bf16* later = k_cache + (size_t(slots[j + COMING]) * kv_heads + kv_head) * dk;
      for (int d = 0; d < dk; d += 32) _mm_prefetch(later + d, _MM_HINT_T0);
    }
    for (int g = 0; g < group; ++g) {
      __m512 part[LANES];
#pragma GCC unroll 16
      for (int j = 0; j < LANES; ++j) part[j] = _mm512_setzero_ps();
      for (int d = 0; d < dk; d += 32) {
        const __m512bh query = (__m512bh)_mm512_loadu_si512(q + g * dk + d);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; ++j)
          part[j] = _mm512_dpbf16_ps(part[j], query, (__m512bh)_mm512_loadu_si512(keys[j] + d));
      }
      const __m512 sums = _mm512_mul_ps(sums_of_lanes(part), _mm512_set1_ps(scaling));
      const __mmask16 real = __mmask16((1u << count) - 1);
      _mm512_storeu_ps(scores + g * pitch, _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), real, capped16(sums, softcap)));
    }
  }

  // Scores become weights, not yet divided by their sum, which is returned.
  static float softmax(float* scores, int padded, float sink) {
    __m512 largest = _mm512_set1_ps(sink);
    for (int j = 0; j < padded; j += LANES) largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + j));
    const float top = _mm512_reduce_max_ps(largest);
    __m512 total = _mm512_setzero_ps();
    for (int j = 0; j < padded; j += LANES) {
      const __m512 weight = power_of_two16(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(top)), _mm512_set1_ps(LOG2_E)));
      _mm512_storeu_ps(scores + j, weight);
      total = _mm512_add_ps(total, weight);
    }
    return _mm512_reduce_add_ps(total) + (sink > -INFINITY ? exponential(sink - top) : 0.0f);
  }

  // 32 columns of the weighted sum for G heads.
  template <int G>
  void weigh(const float* weights, long pitch, const uint32_t* slots, int count, const float* totals, int g, int d,
             const Coming& coming, bf16* out) const {
    __m512 sum[G][2];
#pragma GCC unroll 16
    for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
    for (int j = 0; j < count; ++j) {
      const bf16* row = v_cache + (size_t(slots[j]) * kv_heads + kv_head) * dv + d;
      _mm_prefetch(v_cache + (size_t(slots[j + COMING]) * kv_heads + kv_head) * dv + d, _MM_HINT_T0);
      if (j < coming.count) _mm_prefetch(coming.values + size_t(coming.slots[j]) * kv_heads * dv, _MM_HINT_T1);
      const __m512 low = widen16(row), high = widen16(row + LANES);
#pragma GCC unroll 16
      for (int i = 0; i < G; ++i) {
        const __m512 weight = _mm512_set1_ps(weights[(g + i) * pitch + j]);
        sum[i][0] = _mm512_fmadd_ps(weight, low, sum[i][0]);
        sum[i][1] = _mm512_fmadd_ps(weight, high, sum[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < G; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < 2; ++j)
        narrow16(out + (g + i) * dv + d + j * LANES, _mm512_div_ps(sum[i][j], _mm512_set1_ps(totals[g + i])));
  }

  // `count` queries of each head, the first at `position`. Everything stands on its side, a column for each query of
  // each head: keys times queries, then values times weights. So the softmax runs down the columns, 16 at once.
  void read(const char* q, long q_pitch, char* out, long out_pitch, int position, int count,
            std::vector<float>& scratch) const {
    const int columns = count * group, padded = (columns + STRIP - 1) / STRIP * STRIP;
    scratch.resize(size_t(padded) * (dk / 2 + dv + 3) + PACKS * KEY_BLOCK * (dk + dv) / 2 + KEY_BLOCK * STRIP * 3 + 256);
    char* at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
    const auto take = [&at](size_t numbers) {
      char* here = at;
      at += (numbers + 15) / 16 * 64;
      return here;
    };
    bf16 *keys[PACKS], *values[PACKS];  // (KEY_BLOCK, dk), (dv, KEY_BLOCK)
    for (int i = 0; i < PACKS; ++i) {
      keys[i] = reinterpret_cast<bf16*>(take(size_t(KEY_BLOCK) * dk / 2));
      values[i] = reinterpret_cast<bf16*>(take(size_t(KEY_BLOCK) * dv / 2));
    }
    float* scores[2];      // (KEY_BLOCK, STRIP)
    uint32_t* weights[2];  // (KEY_BLOCK / 2, STRIP) pairs
    for (int i = 0; i < 2; ++i) {
      scores[i] = reinterpret_cast<float*>(take(KEY_BLOCK * STRIP));
      weights[i] = reinterpret_cast<uint32_t*>(take(KEY_BLOCK * STRIP / 2));
    }
    uint32_t* queries = reinterpret_cast<uint32_t*>(take(size_t(padded) * dk / 2));  // by strips (dk / 2, STRIP) pairs
    float* sums = reinterpret_cast<float*>(take(size_t(padded) * dv));           // by strips (dv, STRIP)
    float *largest = reinterpret_cast<float*>(take(padded)), *totals = reinterpret_cast<float*>(take(padded));
    int32_t* positions = reinterpret_cast<int32_t*>(take(padded));
    for (int column = 0; column < padded; ++column) {
      const int known = std::min(column, columns - 1);
      positions[column] = position + known / group;
      largest[column] = sink(known % group) * LOG2_E;
      totals[column] = sinks ? 1.0f : 0.0f;
    }
    std::fill_n(sums, size_t(padded) * dv, 0.0f);
    for (int column = 0; column < padded; column += LANES) {
      const bf16* rows[LANES];
      for (int j = 0; j < LANES; ++j) {
        const int known = std::min(column + j, columns - 1);
        rows[j] = reinterpret_cast<const bf16*>(q + (known / group) * q_pitch) + (known % group) * dk;
      }
      uint32_t* to = queries + size_t(column / STRIP) * (dk / 2) * STRIP + column % STRIP;
      for (int d = 0; d < dk; d += 32) transpose_pairs(rows, d, to + (d / 2) * STRIP, STRIP);
    }
#ifdef LM_AMX
    Tiles tiles;
    if (use_amx) tiles.configure(16, 16);
#endif
    // A strip's columns and a block of keys meet in three acts, each while others are between theirs: what one act has
    // written is not read by the next one at once, which would have to wait for it.
    struct Meeting {
      int block, column, visible;
    };
    const int last = position + count - 1;
    Meeting ahead{first_seen(position) / KEY_BLOCK * KEY_BLOCK, -STRIP, 0}, now{}, behind{};
    const auto advance = [&] {  // to the next strip that sees something of a block
      while (ahead.block <= last) {
        if ((ahead.column += STRIP) == padded) ahead.column = 0, ahead.block += KEY_BLOCK;
        if (ahead.block > last) break;
        if (ahead.column == 0) {
          const int pack = ahead.block / KEY_BLOCK % PACKS;
          this->pack(ahead.block, last, keys[pack], values[pack]);
        }
        const int first_position = positions[ahead.column], last_position = positions[ahead.column + STRIP - 1];
        ahead.visible = std::min(KEY_BLOCK, (last_position - ahead.block) / 32 * 32 + 32);
        if (ahead.block <= last_position && first_seen(first_position) < ahead.block + KEY_BLOCK) return;
      }
      ahead.visible = 0;
    };
    for (int i = 0; i == 0 || now.visible || behind.visible; ++i) {
      advance();
      if (behind.visible)
        multiply(dv, values[behind.block / KEY_BLOCK % PACKS], KEY_BLOCK, weights[i % 2], behind.visible / 2,
                 sums + size_t(behind.column) * dv, true);
      if (now.visible) {
        const bool masked = now.block + now.visible - 1 > positions[now.column] ||
                            now.block < first_seen(positions[now.column + STRIP - 1]);
        for (int half = 0; half < STRIP; half += LANES) {
          const int c = now.column + half;
          const auto kernel = masked || softcap > 0 ? &Bf16Attention::take_in<true> : &Bf16Attention::take_in<false>;
          (this->*kernel)(scores[(i + 1) % 2] + half, now.visible, now.block, positions + c, largest + c, totals + c,
                          sums + size_t(now.column) * dv + half, weights[(i + 1) % 2] + half);
        }
      }
      if (ahead.visible)
        multiply(ahead.visible, keys[ahead.block / KEY_BLOCK % PACKS], dk, queries + size_t(ahead.column) * (dk / 2),
                 dk / 2, scores[i % 2], false);
      behind = now, now = ahead;
    }
    for (int column = 0; column < padded; column += LANES)
      for (int d = 0; d < dv; d += LANES)
        put(sums + size_t(column / STRIP * STRIP) * dv + d * STRIP + column % STRIP, totals + column, column, columns, d,
            out, out_pitch);
  }

  // c (rows, STRIP) = or += a (rows, pairs) times b (pairs, STRIP).
  void multiply(int rows, const bf16* a, long a_pitch, const uint32_t* b, int pairs, float* c, bool add) const {
#ifdef LM_AMX
    if (use_amx) return product_of_tiles(rows, STRIP, a, a_pitch, b, STRIP, pairs, c, STRIP, add);
#endif
    product_of_rows<STRIP / LANES>(rows, a, a_pitch, b, STRIP, pairs, c, STRIP, add);
  }

  // A block of keys as they are, (KEY_BLOCK, dk); of values on its side, (dv, KEY_BLOCK).
  void pack(int block, int last, bf16* keys, bf16* values) const {
    const bf16* value_rows[KEY_BLOCK];
    uint32_t slots[2 * KEY_BLOCK];  // of this block and the next one; what is not there yet gets no weight
    const int count = std::min(2 * KEY_BLOCK, last + 1 - block);
    find_slots(block, count, slots);
    std::fill(slots + count, slots + 2 * KEY_BLOCK, slots[count - 1]);
    for (int j = 0; j < KEY_BLOCK; ++j) {
      const size_t here = size_t(slots[j]) * kv_heads + kv_head, later = size_t(slots[j + KEY_BLOCK]) * kv_heads + kv_head;
      for (int d = 0; d < dk; d += 32) _mm_prefetch(k_cache + later * dk + d, _MM_HINT_T1);
      for (int d = 0; d < dv; d += 32) _mm_prefetch(v_cache + later * dv + d, _MM_HINT_T1);
      value_rows[j] = v_cache + here * dv;
      std::memcpy(keys + j * dk, k_cache + here * dk, size_t(dk) * 2);
    }
    alignas(64) uint32_t pairs[LANES][LANES];  // of tokens, by columns of the values
    const bf16* rows[LANES];
    for (int i = 0; i < LANES; ++i) rows[i] = reinterpret_cast<const bf16*>(pairs[i]);
    for (int j = 0; j < KEY_BLOCK; j += 2 * LANES)
      for (int d = 0; d < dv; d += LANES) {
        const auto load = [d](const bf16* row) {
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d)));
        };
        for (int i = 0; i < LANES; ++i)
          _mm512_store_si512(pairs[i], _mm512_or_si512(load(value_rows[j + 2 * i]),
                                                       _mm512_slli_epi32(load(value_rows[j + 2 * i + 1]), 16)));
        transpose_pairs(rows, 0, reinterpret_cast<uint32_t*>(values + d * KEY_BLOCK + j), KEY_BLOCK / 2);
      }
  }

  // The running softmax of 16 columns takes in the scores of a block's first `visible` keys. What weights are relative
  // to is changed only for a score that is much larger: the result is the same, and most blocks need no new sums.
  template <bool SPECIAL>
  void take_in(float* scores, int visible, int block, const int32_t* positions, float* largest, float* totals,
               float* sums, uint32_t* weights) const {
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    // Scores stay as they are but for a cap, so that the same is computed whether or not something is hidden.
    const __m512 factor = _mm512_set1_ps(softcap > 0 ? LOG2_E : scaling * LOG2_E);
    __m512 top = nothing;
    if (SPECIAL) {
      const __m512i newest = _mm512_loadu_si512(positions);
      const __m512i oldest = window ? _mm512_sub_epi32(newest, _mm512_set1_epi32(window - 1)) : _mm512_setzero_si512();
      for (int j = 0; j < visible; ++j) {
        const __m512i here = _mm512_set1_epi32(block + j);
        const __mmask16 seen = _mm512_cmple_epi32_mask(here, newest) & _mm512_cmpge_epi32_mask(here, oldest);
        __m512 score = _mm512_loadu_ps(scores + j * STRIP);
        if (softcap > 0) score = capped16(_mm512_mul_ps(score, _mm512_set1_ps(scaling)), softcap);
        score = _mm512_mask_mov_ps(nothing, seen, score);
        _mm512_storeu_ps(scores + j * STRIP, score);
        top = _mm512_max_ps(top, score);
      }
    } else {
      __m512 tops[4] = {nothing, nothing, nothing, nothing};  // visible is a multiple of 32
      for (int j = 0; j < visible; j += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) tops[i] = _mm512_max_ps(tops[i], _mm512_loadu_ps(scores + (j + i) * STRIP));
      top = _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
    }
    top = _mm512_mul_ps(top, factor);
    __m512 base = _mm512_loadu_ps(largest), total = _mm512_loadu_ps(totals);
    const __mmask16 grows = _mm512_cmp_ps_mask(top, _mm512_add_ps(base, _mm512_set1_ps(MUCH_LARGER)), _CMP_GT_OQ);
    if (grows) {
      const __m512 next = _mm512_mask_mov_ps(base, grows, top);
      const __m512 shrink = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), grows, power_of_two16(_mm512_sub_ps(base, next)));
      total = _mm512_mul_ps(total, shrink);
      for (int d = 0; d < dv; ++d)
        _mm512_storeu_ps(sums + d * STRIP, _mm512_mul_ps(_mm512_loadu_ps(sums + d * STRIP), shrink));
      _mm512_storeu_ps(largest, next);
      base = next;
    }
    // Nothing seen yet: any finite number keeps the weights zero.
    base = _mm512_mask_mov_ps(base, _mm512_cmp_ps_mask(base, nothing, _CMP_EQ_OQ), _mm512_setzero_ps());
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 2
    for (int j = 0; j < visible; j += 2) {
      const float* here = scores + j * STRIP;
      const __m512 even = power_of_two16(_mm512_fmsub_ps(_mm512_loadu_ps(here), factor, base));
      const __m512 odd = power_of_two16(_mm512_fmsub_ps(_mm512_loadu_ps(here + STRIP), factor, base));
      total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
      _mm512_storeu_si512(weights + j / 2 * STRIP, _mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    }
    _mm512_storeu_ps(totals, total);
  }

  // 16 columns' sums of 16 numbers each, (16, STRIP), divided by their totals and set upright.
  void put(const float* sums, const float* totals, int column, int columns, int d, char* out, long out_pitch) const {
    alignas(64) float divided[LANES][LANES], upright[LANES][LANES];
    const bf16* rows[LANES];
    for (int i = 0; i < LANES; ++i) {
      _mm512_store_ps(divided[i], _mm512_div_ps(_mm512_loadu_ps(sums + i * STRIP), _mm512_loadu_ps(totals)));
      rows[i] = reinterpret_cast<const bf16*>(divided[i]);
    }
    transpose_pairs(rows, 0, reinterpret_cast<uint32_t*>(upright[0]), LANES);
    for (int i = 0; i < std::min(LANES, columns - column); ++i) {
      const int query = (column + i) / group, head = (column + i) % group;
      narrow16(reinterpret_cast<bf16*>(out + query * out_pitch) + head * dv + d, _mm512_load_ps(upright[i]));
    }
  }
};

}  // namespace lm
