// Packing weights, and single products, for Python.
#include <omp.h>

#include "gemm.h"

using namespace lm;

namespace {

float number(const void* w, int type, size_t at) {
  return type == T_BF16 ? widen(static_cast<const bf16*>(w)[at]) : static_cast<const float*>(w)[at];
}

uint16_t half(float x) { return uint16_t(_cvtss_sh(x, 0)); }
float unhalf(uint16_t x) { return _cvtsh_ss(x); }

// Where the number (i along k, output j of the panel) stands: pairs for bf16 activations, quads for bytes.
size_t place_int8(const Weight& w, int i, int j) {
  const int step = w.use_amx ? 2 : 4;
  return size_t(i / step) * PANEL * step + j * step + i % step;
}

void pack_panel_int8(const void* w, int type, Weight& to, long panel) {
  int8_t* data = static_cast<int8_t*>(to.data) + panel * panel_bytes(to);
  std::memset(data, 0, panel_bytes(to));
  for (int j = 0; j < PANEL; ++j) {
    const long output = panel * PANEL + j;
    float largest = 0;
    for (int i = 0; i < to.k && output < to.n; ++i)
      largest = larger(largest, std::fabs(number(w, type, size_t(output) * to.k + i)));
    to.scales[output] = largest / 127.0f;
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (int i = 0; i < to.k && output < to.n; ++i)
      data[place_int8(to, i, j)] =
          int8_t(int(std::nearbyint(number(w, type, size_t(output) * to.k + i) * inverse)) + (to.use_amx ? 0 : SHIFT));
  }
}

// q: one value a byte, (n, k); scale and minimum: (n, groups).
void pack_panel_int4(const uint8_t* q, const float* scale, const float* minimum, Weight& to, long panel) {
  const int deep = padded_k(INT4, to.k), groups = deep / GROUP;
  char* data = static_cast<char*>(to.data) + panel * panel_bytes(INT4, to.k);
  for (int g = 0; g < groups; ++g) {
    uint8_t* group = reinterpret_cast<uint8_t*>(data + g * GROUP_BYTES);
    uint16_t* halves = reinterpret_cast<uint16_t*>(group + 512);
    for (int j = 0; j < PANEL; ++j) {
      const long output = panel * PANEL + j;
      const bool real = output < to.n;
      halves[j] = real ? half(scale[output * groups + g]) : 0;
      halves[PANEL + j] = real ? half(minimum[output * groups + g]) : 0;
      for (int i = 0; i < GROUP; ++i) {
        const int at = g * GROUP + i;
        const uint8_t value = real && at < to.k ? q[size_t(output) * to.k + at] : 0;
        uint8_t& byte = group[(i / 4 % 4) * 128 + j * 4 + i % 4];
        byte = i < 16 ? value : uint8_t(byte | value << 4);
      }
    }
  }
}

// The nearest of 16 steps between the smallest and the largest number of each group.
void quantize_int4(const void* w, int type, int n, int k, long output, uint8_t* q, float* scale, float* minimum) {
  (void)n;
  const int groups = padded_k(INT4, k) / GROUP;
  for (int g = 0; g < groups; ++g) {
    float low = INFINITY, high = -INFINITY;
    const int count = std::min(GROUP, k - g * GROUP);
    for (int i = 0; i < count; ++i) {
      const float x = number(w, type, size_t(output) * k + g * GROUP + i);
      low = smaller(low, x), high = larger(high, x);
    }
    const float step = unhalf(half((high - low) / 15.0f)), start = unhalf(half(low));
    scale[output * groups + g] = step, minimum[output * groups + g] = start;
    for (int i = 0; i < count; ++i) {
      const float x = number(w, type, size_t(output) * k + g * GROUP + i);
      const float steps = step > 0 ? std::nearbyint((x - start) / step) : 0.0f;
      q[size_t(output) * k + g * GROUP + i] = uint8_t(larger(0.0f, smaller(15.0f, steps)));
    }
  }
}

}  // namespace

extern "C" {

int lm_tiles() {
#ifdef LM_AMX
  return ask_for_tiles();
#else
  return 0;
#endif
}

int64_t lm_data_bytes(const Weight* w) { return int64_t(num_panels(*w)) * panel_bytes(*w); }
int64_t lm_prepared_bytes(const Weight* w) { return prepared_bytes(*w); }

// w: (n, k), T_F32 or T_BF16. For INT4: `q`, `scale` and `minimum` are room for it, (n, k) bytes and (n, groups) floats.
void lm_pack(Weight* to, const void* w, int type, uint8_t* q, float* scale, float* minimum, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long panel = 0; panel < num_panels(*to); ++panel) {
    if (to->kind == INT8) {
      pack_panel_int8(w, type, *to, panel);
    } else if (to->kind == INT4) {
      for (long output = panel * PANEL; output < std::min<long>(to->n, (panel + 1) * PANEL); ++output)
        quantize_int4(w, type, to->n, to->k, output, q, scale, minimum);
      pack_panel_int4(q, scale, minimum, *to, panel);
    } else {
      const int deep = padded_k(to->kind, to->k), step = to->kind == BF16 ? 2 : 1;
      char* data = static_cast<char*>(to->data) + panel * panel_bytes(to->kind, to->k);
      for (int i = 0; i < deep; ++i)
        for (int j = 0; j < PANEL; ++j) {
          const long output = panel * PANEL + j;
          const float x = output < to->n && i < to->k ? number(w, type, size_t(output) * to->k + i) : 0.0f;
          const size_t at = size_t(i / step) * PANEL * step + j * step + i % step;
          if (step == 2)
            reinterpret_cast<bf16*>(data)[at] = narrow(x);
          else
            reinterpret_cast<float*>(data)[at] = x;
        }
    }
  }
}

// The weight as it counts, (n, k) floats.
void lm_unpack(const Weight* from, float* w) {
  const Weight& f = *from;
  for (long output = 0; output < f.n; ++output) {
    const char* data = static_cast<const char*>(f.data) + output / PANEL * panel_bytes(f);
    const int j = output % PANEL;
    for (int i = 0; i < f.k; ++i) {
      float& x = w[size_t(output) * f.k + i];
      if (f.kind == F32) {
        x = reinterpret_cast<const float*>(data)[size_t(i) * PANEL + j];
      } else if (f.kind == BF16) {
        x = widen(reinterpret_cast<const bf16*>(data)[size_t(i / 2) * 64 + j * 2 + i % 2]);
      } else if (f.kind == INT8) {
        x = int8_t(data[place_int8(f, i, j)] ^ (f.use_amx ? 0 : SHIFT)) * f.scales[output];
      } else {
        const uint8_t* group = reinterpret_cast<const uint8_t*>(data + i / GROUP * GROUP_BYTES);
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(group + 512);
        const int at = i % GROUP;
        const uint8_t byte = group[(at / 4 % 4) * 128 + j * 4 + at % 4];
        x = (at < 16 ? byte & 15 : byte >> 4) * unhalf(halves[j]) + unhalf(halves[PANEL + j]);
      }
    }
  }
}

void lm_linear(const Weight* w, const void* a, int64_t lda, int64_t m, void* c, int type, int64_t ldc, void* scratch,
               int threads) {
#pragma omp parallel num_threads(threads)
  {
    const long thread = omp_get_thread_num(), team = omp_get_num_threads();
    prepare(*w, a, type, lda, m * thread / team, m * (thread + 1) / team, scratch);
#pragma omp barrier
    const long panels = num_panels(*w);
    product(*w, a, lda, scratch, int(m), c, type, ldc, panels * thread / team, panels * (thread + 1) / team);
  }
}

}  // extern "C"
