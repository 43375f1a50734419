// Vectors of float32 with bfloat16 loads and stores, and the activations on them.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace multibeta {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

inline Vec load(const float* p) { return Vec::loadu(p); }
inline Vec load(const float* p, int64_t count) { return Vec::loadu(p, count); }

inline Vec load(const c10::BFloat16* p) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
  float wide[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) wide[i] = static_cast<float>(p[i]);
  return Vec::loadu(wide);
#endif
}

inline Vec load(const c10::BFloat16* p, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#else
  float wide[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<float>(p[i]);
  return Vec::loadu(wide);
#endif
}

inline void store(float* p, Vec v) { v.store(p); }
inline void store(float* p, Vec v, int64_t count) { v.store(p, static_cast<int>(count)); }

inline void store(c10::BFloat16* p, Vec v, int64_t count) {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), (__m256i)_mm512_cvtneps_pbh(v));
#else
  at::vec::convert_float_bfloat16(v, v).store(p, static_cast<int>(count));
#endif
}

inline void store(c10::BFloat16* p, Vec v) {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
#else
  store(p, v, kLanes);
#endif
}

// Two neighbouring vectors; kStream bypasses the caches, p must then be aligned to the vector.
template <bool kStream>
inline void store_pair(float* p, Vec first, Vec second) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kStream) {
    _mm512_stream_ps(p, first);
    _mm512_stream_ps(p + kLanes, second);
    return;
  }
#endif
  first.store(p);
  second.store(p + kLanes);
}

template <bool kStream>
inline void store_pair(c10::BFloat16* p, Vec first, Vec second) {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  if constexpr (kStream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
  } else {
    _mm512_storeu_si512(p, both);
  }
#else
  at::vec::convert_float_bfloat16(first, second).store(p);
#endif
}

inline void stream_fence() {
#if defined(CPU_CAPABILITY_AVX512)
  _mm_sfence();
#endif
}

// 1 / (1 + exp(-v)). kFine: float32 accuracy (about 2e-7 relative); otherwise 1.5e-4, a thirtieth of a bfloat16 step.
template <bool kFine>
inline Vec sigmoid(Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 log2e = _mm512_set1_ps(-1.44269504f);
  // exp stays finite for the Newton step; the order of the operands lets NaN through
  const __m512 x = kFine ? _mm512_max_ps(_mm512_set1_ps(-87.f), v) : v.values;
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_fmsub_ps(x, log2e, whole);
  __m512 p;  // 2^f on [-1/2, 1/2], least relative error
  if constexpr (kFine) {
    p = _mm512_fmadd_ps(_mm512_set1_ps(1.327647245e-3f), f, _mm512_set1_ps(9.675541893e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05550713092f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2402212024f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693146944f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  } else {
    p = _mm512_fmadd_ps(_mm512_set1_ps(0.05517166853f), f, _mm512_set1_ps(0.24261114f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6932609677f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999280572f));
  }
  const __m512 one_plus = _mm512_add_ps(_mm512_set1_ps(1.f), _mm512_scalef_ps(p, whole));
  const __m512 r = _mm512_rcp14_ps(one_plus);
  if constexpr (!kFine) return r;
  return _mm512_mul_ps(r, _mm512_fnmadd_ps(one_plus, r, _mm512_set1_ps(2.f)));
#else
  return Vec(1.f) / (Vec(1.f) + v.neg().exp_u20());
#endif
}

enum Activation : int { kNone = 0, kSilu = 1, kSigmoid = 2 };

template <int kActivation, typename T>
inline Vec activate(Vec v) {
  if constexpr (kActivation == kNone) return v;
  const Vec s = sigmoid<std::is_same_v<T, float>>(v);
  return kActivation == kSilu ? v * s : s;
}

template <int kActivation, typename T>
inline Vec activation_slope(Vec v) {
  if constexpr (kActivation == kNone) return Vec(1.f);
  const Vec s = sigmoid<std::is_same_v<T, float>>(v);
  const Vec rest = Vec(1.f) - s;
  return kActivation == kSilu ? s * at::vec::fmadd(v, rest, Vec(1.f)) : s * rest;
}

inline float lane_sum(Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[kLanes];
  v.store(lanes);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

}  // namespace multibeta
