// Products of activations with weights, C = A W^T + bias, of weights packed once for it.
//
// A weight (n, k) is cut into panels of 32 outputs. A panel is what the processor's dot products read in one sweep: for
// each step along k the numbers of all 32 outputs side by side, as many numbers of each as one instruction takes
// (`step`: 1 float, 2 bf16, 4 int8, 8 int4).
//
//          output:    0         1        …   31
//        k 0..s-1   [s numbers][s numbers] … [s numbers]     = 128 bytes
//        k s..2s-1  [s numbers][s numbers] … [s numbers]
//        …                                                    k is padded with zeros to a multiple of `depth`
//
// AVX-512 reads a line as two registers and multiplies it by one broadcast piece of a row of A; AMX reads 16 lines as two
// tiles, with the same bytes in the same places. A panel is read from memory once for all rows: that is what a step with
// few rows costs. What an output row becomes depends on its own numbers alone: the order of its additions is the same
// whatever the number of rows, so batching never changes an answer. (Sums of integers have no order.)
//
// Activations may need a preparation, row by row: for int8 and int4 they become bytes with a scale for 64 or 32 numbers.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "rows.h"

namespace lm {

enum Kind : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
enum Type : int32_t { T_F32 = 0, T_BF16 = 1 };

constexpr int PANEL = 32;  // outputs

struct Weight {
  int32_t kind;
  int32_t n, k;
  int32_t use_amx;
  void* data;          // the panels
  float* scales;       // INT8: (panels * 32); else null (INT4's stand in the panels)
  float* bias;         // (panels * 32), or null
};

inline int depth(int kind) { return kind == F32 ? 1 : kind == BF16 ? 32 : kind == INT8 ? 64 : 32; }
inline int padded_k(int kind, int k) { return (k + depth(kind) - 1) / depth(kind) * depth(kind); }
inline int num_panels(const Weight& w) { return (w.n + PANEL - 1) / PANEL; }

// INT4: a group is 32 numbers along k of 32 outputs: 4 lines of nibbles, then 32 scales and 32 minima in float16.
constexpr int GROUP = 32;
constexpr size_t GROUP_BYTES = 4 * 128 + 2 * 2 * PANEL;

// Whether 8-bit weights meet bf16 activations (panel_int8.h).
inline bool widens(const Weight& w) { return w.kind == INT8 && w.use_amx; }

inline size_t panel_bytes(int kind, int k) {
  const size_t deep = padded_k(kind, k);
  switch (kind) {
    case F32: return deep * PANEL * 4;
    case BF16: return deep * PANEL * 2;
    case INT8: return deep * PANEL;
    default: return deep / GROUP * GROUP_BYTES;
  }
}

inline size_t panel_bytes(const Weight& w) {
  return widens(w) ? size_t(padded_k(BF16, w.k)) * PANEL : panel_bytes(w.kind, w.k);
}

// Bytes of one prepared row of activations; 0 where rows are used as they are.
inline size_t prepared_bytes(const Weight& w) {
  const size_t deep = padded_k(widens(w) ? BF16 : w.kind, w.k);
  size_t bytes = 0;
  if (w.kind == BF16 && deep != size_t(w.k)) bytes = deep * 2;
  if (widens(w)) bytes = deep * 2;  // also of float32
  if (w.kind == INT8 && !w.use_amx) bytes = deep + deep / 64 * 8;
  if (w.kind == INT4) bytes = deep + deep / GROUP * 8;
  return (bytes + 63) / 64 * 64;
}

}  // namespace lm

#include "sweep.h"
#include "panel_bf16.h"
#include "panel_f32.h"
#include "panel_int4.h"
#include "panel_int8.h"

namespace lm {

inline void prepare(const Weight& w, const void* a, int type, size_t lda, long begin, long end, void* scratch) {
  const size_t bytes = prepared_bytes(w);
  if (bytes == 0) return;
  for (long row = begin; row < end; ++row) {
    char* to = static_cast<char*>(scratch) + row * bytes;
    if (widens(w) && type == T_F32) {
      const float* from = static_cast<const float*>(a) + row * lda;
      std::memset(to, 0, bytes);
      for (int i = 0; i < w.k; ++i) reinterpret_cast<bf16*>(to)[i] = narrow(from[i]);
    } else if (w.kind == BF16 || widens(w)) {
      const size_t used = size_t(w.k) * 2;
      std::memcpy(to, static_cast<const bf16*>(a) + row * lda, used);
      std::memset(to + used, 0, bytes - used);
    } else if (type == T_BF16) {
      const bf16* from = static_cast<const bf16*>(a) + row * lda;
      w.kind == INT8 ? prepare_int8(w, from, to) : prepare_int4(w, from, to);
    } else {
      const float* from = static_cast<const float*>(a) + row * lda;
      w.kind == INT8 ? prepare_int8(w, from, to) : prepare_int4(w, from, to);
    }
  }
}

// Outputs of panels [begin, end) for m rows. `scratch` holds the rows as `prepare` has made them.
inline void product(const Weight& w, const void* a, size_t lda, const void* scratch, int m, void* c, int type, size_t ldc,
                    long begin, long end) {
  if (begin >= end || m == 0) return;
  const Output out{c, type, ldc, w.n, w.bias, w.scales};
  switch (w.kind) {
    case F32: panels_f32(w, static_cast<const float*>(a), lda, m, out, begin, end); break;
    case BF16: {
      const size_t bytes = prepared_bytes(w);
      const bf16* rows = static_cast<const bf16*>(bytes ? scratch : a);
      panels_bf16(w, rows, bytes ? bytes / 2 : lda, m, out, begin, end);
      break;
    }
    case INT8:
#ifdef LM_AMX
      if (widens(w)) {
        const size_t bytes = prepared_bytes(w);
        panels_int8_by_tiles(w, static_cast<const bf16*>(scratch), bytes / 2, m, out, begin, end);
        break;
      }
#endif
      panels_int8(w, static_cast<const char*>(scratch), m, out, begin, end); break;
    default: panels_int4(w, static_cast<const char*>(scratch), m, out, begin, end);
  }
}

}  // namespace lm
