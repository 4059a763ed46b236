// The arithmetic of row operations: number formats, and functions that a compiler can make vectors of.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace lm {

using bf16 = uint16_t;  // the upper half of a float

inline float from_bits(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline uint32_t to_bits(float number) {
  uint32_t result;
  std::memcpy(&result, &number, 4);
  return result;
}

inline float widen(bf16 number) { return from_bits(uint32_t(number) << 16); }
inline float widen(float number) { return number; }
inline float widen(int64_t number) { return float(number); }
inline float widen(int32_t number) { return float(number); }
inline float widen(uint8_t number) { return float(number); }

// To the nearest, ties to even, as torch rounds. What processors and this format give for "no number" stays none.
inline bf16 narrow(float number) {
  const uint32_t bits = to_bits(number);
  return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float rounded(float number) {
  const uint32_t bits = to_bits(number);
  return from_bits((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// Comparisons and not fmin and fmax: those mind numbers that are none, and so do not become vectors.
inline float smaller(float a, float b) { return a < b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }

// e^x: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients), within 2 units in the last place. Results
// below the smallest normal number are 0.
inline float exponential(float x) {
  const float clipped = larger(smaller(x, 88.72283f), -87.33654f);
  const float shifted = clipped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum has no fraction bits
  const float n = shifted - 12582912.0f;
  const float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Two factors, for 2^128 has no exponent of its own.
  const int32_t whole = int32_t(n), half = whole >> 1;
  p = p * from_bits(uint32_t(half + 127) << 23) * from_bits(uint32_t(whole - half + 127) << 23);
  p = x > 88.72283f ? INFINITY : p;
  p = x < -87.33654f ? 0.0f : p;
  return x == x ? p : x;
}

inline float hyperbolic_tangent(float x) {
  const float a = std::fabs(x), e = exponential(-2.0f * a);
  const float large = (1.0f - e) / (1.0f + e);
  const float s = x * x;  // below 0.1 the quotient would lose digits
  const float small = a * (1.0f + s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315))));
  return std::copysign(a < 0.1f ? small : large, x);
}

// Abramowitz and Stegun 7.1.26 where it is good enough for the sum 1 + erf (absolute error 1.5e-7), a series near zero.
inline float error_function(float x) {
  const float a = std::fabs(x), t = 1.0f / (1.0f + 0.3275911f * a);
  const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float large = 1.0f - p * exponential(-a * a);
  const float s = a * a;
  const float small = a * 1.1283791671f * (1.0f - s * (1.0f / 3 - s * (0.1f - s * (1.0f / 42 - s / 216))));
  return std::copysign(a < 0.5f ? small : large, x);
}

inline float gelu(float x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678118654752f)); }

inline float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

inline float power(float x, float exponent) { return std::pow(x, exponent); }

}  // namespace lm
