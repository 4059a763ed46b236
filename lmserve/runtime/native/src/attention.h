// Attention over the paged cache: writing keys and values, and attending, one item of work at a time.
//
// An item is a key-value head of one sequence and either its one new token (decoding) or up to QUERY_BLOCK of its new
// tokens (a prompt's chunk); the query heads of the key-value head are further rows of the same item, so that keys and
// values are read once for all of them. Which keys are looked at together depends on their positions alone (blocks of
// KEY_BLOCK from the sequence's beginning), so no neighbour and no cut of a prompt changes a row's arithmetic.
//
// Decoding: scores of all keys, their softmax, the weighted sum of the values, all in float32 but for the bf16 products.
// Prompts: the running softmax of FlashAttention (arXiv:2205.14135), a block of keys and values at a time, so that both
// of attention's products are small matrix products. Its reference follows the largest score only where that has grown
// much, which leaves most sums as they are (as FlashAttention-4 does).
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

#include "rows.h"
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LM_ATTENTION_BF16 1
#include "attention_bf16.h"
#endif

namespace lm {

constexpr int QUERY_BLOCK = 64;

struct Span {        // the newest `length` of a sequence's `context` tokens, in the step's rows from `row` on
  int32_t row, length, context, table;  // table: where its block table begins
};

struct Attention {
  int32_t type, heads, kv_heads, key_size, value_size, window, block_size, use_amx;
  float scaling, softcap;   // softcap 0: none; window 0: none
  const float* sinks;       // a logit for each head, or null
  void *k_cache, *v_cache;  // (slots, kv_heads, size)
};

struct Matrix {  // rows of a step
  char* data;
  int64_t pitch;  // bytes
};

struct Work {  // of one attention item
  int32_t span, kv_head, first, count;  // queries [first, first + count) of the span
};

// The step's rows [begin, end) go to their places in the cache.
inline void write_cache(const Attention& a, Matrix k, Matrix v, const int64_t* slots, long begin, long end) {
  const size_t size = a.type == 1 ? 2 : 4;
  const size_t k_bytes = size * a.kv_heads * a.key_size, v_bytes = size * a.kv_heads * a.value_size;
  for (long row = begin; row < end; ++row) {
    std::memcpy(static_cast<char*>(a.k_cache) + slots[row] * k_bytes, k.data + row * k.pitch, k_bytes);
    std::memcpy(static_cast<char*>(a.v_cache) + slots[row] * v_bytes, v.data + row * v.pitch, v_bytes);
  }
}

inline float capped(float score, float softcap) {
  return softcap > 0 ? softcap * hyperbolic_tangent(score / softcap) : score;
}

// Any sizes, any number format, one query at a time.
template <typename T>
void attend_plainly(const Attention& a, const Span& span, const int32_t* table, const Work& work, Matrix q, Matrix out,
                    std::vector<float>& scratch) {
  const int group = a.heads / a.kv_heads, dk = a.key_size, dv = a.value_size;
  const T *k_cache = static_cast<const T*>(a.k_cache), *v_cache = static_cast<const T*>(a.v_cache);
  scratch.resize(span.context + dv + dk);
  float *scores = scratch.data(), *sum = scores + span.context, *query = sum + dv;
  const auto slot = [&](int position) -> size_t {
    return size_t(table[position / a.block_size]) * a.block_size + position % a.block_size;
  };
  for (int i = work.first; i < work.first + work.count; ++i) {
    const int position = span.context - span.length + i;
    const int begin = a.window ? std::max(0, position + 1 - a.window) : 0;
    for (int g = 0; g < group; ++g) {
      const int head = work.kv_head * group + g;
      const T* q_row = reinterpret_cast<const T*>(q.data + (span.row + i) * q.pitch) + head * dk;
      for (int d = 0; d < dk; ++d) query[d] = widen(q_row[d]);
      float largest = a.sinks ? a.sinks[head] : -INFINITY;
      for (int p = begin; p <= position; ++p) {
        const T* key = k_cache + (slot(p) * a.kv_heads + work.kv_head) * dk;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int d = 0; d < dk; ++d) dot += query[d] * widen(key[d]);
        scores[p] = capped(dot * a.scaling, a.softcap);
        largest = std::fmax(largest, scores[p]);
      }
      float total = a.sinks ? exponential(a.sinks[head] - largest) : 0;
      std::fill(sum, sum + dv, 0.0f);
      for (int p = begin; p <= position; ++p) {
        const float weight = exponential(scores[p] - largest);
        const T* value = v_cache + (slot(p) * a.kv_heads + work.kv_head) * dv;
        total += weight;
#pragma omp simd
        for (int d = 0; d < dv; ++d) sum[d] += weight * widen(value[d]);
      }
      T* result = reinterpret_cast<T*>(out.data + (span.row + i) * out.pitch) + head * dv;
      for (int d = 0; d < dv; ++d) {
        if constexpr (sizeof(T) == 2)
          result[d] = narrow(sum[d] / total);
        else
          result[d] = sum[d] / total;
      }
    }
  }
}

#ifdef LM_ATTENTION_BF16
inline Bf16Attention bf16_attention(const Attention& a, const int32_t* table, int kv_head) {
  return {static_cast<const bf16*>(a.k_cache),
          static_cast<const bf16*>(a.v_cache),
          table,
          a.block_size,
          a.kv_heads,
          kv_head,
          a.heads / a.kv_heads,
          a.key_size,
          a.value_size,
          a.window,
          a.scaling,
          a.softcap,
          a.sinks,
          a.use_amx != 0};
}
#endif

// One item. `next`: the one that this thread will do after it, or null; what it reads first is fetched meanwhile.
inline void attend(const Attention& a, const Span* spans, const int32_t* tables, const Work& work, const Work* next,
                   Matrix q, Matrix out, std::vector<float>& scratch) {
  const Span& span = spans[work.span];
  const int32_t* table = tables + span.table;
#ifdef LM_ATTENTION_BF16
  if (a.type == 1 && a.key_size % 32 == 0 && a.value_size % 32 == 0 && a.key_size <= 256) {
    const Bf16Attention problem = bf16_attention(a, table, work.kv_head);
    const int head = work.kv_head * problem.group, position = span.context - span.length + work.first;
    const char* first_query = q.data + (span.row + work.first) * q.pitch + size_t(head) * a.key_size * 2;
    char* first_out = out.data + (span.row + work.first) * out.pitch + size_t(head) * a.value_size * 2;
    if (span.length == 1) {
      const Span& later = spans[next ? next->span : work.span];
      const Bf16Attention following = bf16_attention(a, tables + later.table, next ? next->kv_head : 0);
      problem.decode(reinterpret_cast<const bf16*>(first_query), reinterpret_cast<bf16*>(first_out), position,
                     next ? &following : nullptr, later.context - 1, scratch);
    } else {
      problem.read(first_query, q.pitch, first_out, out.pitch, position, work.count, scratch);
    }
    return;
  }
#endif
  if (a.type == 1)
    attend_plainly<bf16>(a, span, table, work, q, out, scratch);
  else
    attend_plainly<float>(a, span, table, work, q, out, scratch);
}

}  // namespace lm
