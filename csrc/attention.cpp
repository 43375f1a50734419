// softmax(query key^T / sqrt(head_dim)) value, float32 and bfloat16, any strides but a unit stride of head_dim.
//
// The lanes of a vector are queries: scores, weights and their sum need no reduction across lanes, and key and value are
// read one broadcast word at a time. A word is a float; with AVX512_BF16, a pair of bfloat16 multiplied by one instruction:
// two channels of query and key, two keys of weight and value. What one query sees depends on its own sample only: results
// are the same bit for bit for any number of threads and any batch around the sample.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

#include "vectors.h"

namespace multibeta {
namespace {

using at::Tensor;

#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kMaxVectors = 4;  // vectors of queries in flight: 16 accumulators of 32 registers
constexpr int64_t tile_of(int64_t vectors) { return vectors <= 2 ? 8 : 4; }
#else
constexpr int64_t kMaxVectors = 2;  // 8 accumulators of 16 registers
constexpr int64_t tile_of(int64_t vectors) { return vectors == 1 ? 8 : 4; }
#endif
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
constexpr bool kHavePairs = true;
#else
constexpr bool kHavePairs = false;
#endif
constexpr int64_t kMaxTile = 8;
constexpr int64_t kKeyBlock = 64;  // weights of a block of queries and keys stay in the first-level cache
constexpr int64_t kMaxHeadDim = 256;
constexpr float kSafeExponent = 60.f;  // scores below, in powers of two, need no maximum: sums of their powers stay in range
constexpr int64_t kGrainWork = 1 << 20;  // least multiplications of a task

// Loops over tiles are unrolled whole, else their arrays of vectors stay in memory.
#define MULTIBETA_UNROLL _Pragma("GCC unroll 8")

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// 2^v for v up to 127. kFine: float32 accuracy (1e-7 relative); otherwise 7e-5, a thirtieth of a bfloat16 step.
template <bool kFine>
inline Vec exp2(Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 f = _mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // v - floor(v)
  __m512 p;  // 2^f on [0, 1], least relative error
  if constexpr (kFine) {
    p = _mm512_fmadd_ps(_mm512_set1_ps(1.87757668e-3f), f, _mm512_set1_ps(8.98933969e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0558263175f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2401536107f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931530833f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99999994f));
  } else {
    p = _mm512_fmadd_ps(_mm512_set1_ps(0.0780245215f), f, _mm512_set1_ps(0.2260671556f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6958335638f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999251962f));
  }
  return _mm512_scalef_ps(p, v);
#else
  return (v * Vec(0.693147181f)).exp();
#endif
}

inline Vec broadcast(const float* word) { return Vec(*word); }

// acc + a b per lane; kPairs: both are pairs of bfloat16, acc + a_0 b_0 + a_1 b_1.
template <bool kPairs>
inline Vec multiply_add(Vec a, Vec b, Vec acc) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  if constexpr (kPairs) return _mm512_dpbf16_ps(acc, (__m512bh)a.values, (__m512bh)b.values);
#endif
  return at::vec::fmadd(a, b, acc);
}

// The weights of two keys, rounded to bfloat16 and paired per lane.
inline Vec pair_of(Vec first, Vec second) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kInterleaved[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), both));
#else
  return first;
#endif
}

template <typename T>
struct Rows {  // (L, head_dim) of one sample and head
  const T* data;
  int64_t stride;
  const T* operator[](int64_t row) const { return data + row * stride; }
};

// Words from `word` on of a row of head_dim values, zeros behind its end.
template <bool kPairs, typename T>
inline Vec words_of(const T* row, int64_t head_dim, int64_t word) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kPairs) {
    const int64_t left = head_dim - 2 * word;
    const __mmask32 mask = left < 32 ? (1u << left) - 1 : ~0u;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, row + 2 * word));
  }
#endif
  return word + kLanes <= head_dim ? load(row + word) : load(row + word, head_dim - word);
}

// Rows `first` and `second` of `value`, zeros where they do not exist, as pairs of bfloat16 from column `d` on.
template <typename T>
inline Vec pairs_of(Rows<T> value, int64_t first, int64_t length, int64_t head_dim, int64_t d) {
#if defined(CPU_CAPABILITY_AVX512)
  const int64_t count = std::min(kLanes, head_dim - d);
  const Vec low = first < length ? load(value[first] + d, count) : Vec(0.f);
  const Vec high = first + 1 < length ? load(value[first + 1] + d, count) : Vec(0.f);
  const __m512i shifted = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
  return _mm512_castsi512_ps(_mm512_or_si512(shifted, _mm512_castps_si512(high)));
#else
  return Vec(0.f);
#endif
}

// The larger, NaN where one is NaN.
inline float larger(float a, float b) { return a <= b || std::isnan(b) ? b : a; }

// Keys and values of one sample and head as words, and buffers of one block of queries.
template <bool kPairs>
struct Workspace {
  static constexpr int64_t kWidth = kMaxVectors * kLanes;
  int64_t length, head_dim, words, columns, padded_length;  // columns of value, padded to whole tiles
  std::unique_ptr<float[]> memory;
  float *key, *value, *query, *weights, *sums, *staged;
  float longest_key;  // largest squared norm

  Workspace(int64_t length, int64_t head_dim) : length(length), head_dim(head_dim) {
    words = kPairs ? (head_dim + 1) / 2 : head_dim;
    columns = round_up(head_dim, kMaxTile);
    padded_length = round_up(length, kMaxTile);
    const int64_t value_rows = kPairs ? padded_length / 2 : padded_length;
    const int64_t stage = kLanes * round_up(columns, kLanes);
    const int64_t spare = 6 * 2 * kLanes + 16;  // of six buffers, and to start on a cache line
    const int64_t total = padded_length * words + value_rows * columns + (words + kKeyBlock + columns) * kWidth + stage + spare;
    memory.reset(new float[total]);
    float* at = reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(memory.get()), 64));
    const auto take = [&](int64_t count) {
      float* taken = at;
      at += round_up(count, kLanes) + kLanes;  // a vector to spare
      return taken;
    };
    key = take(padded_length * words);
    value = take(value_rows * columns);
    query = take(words * kWidth);
    weights = take(kKeyBlock * kWidth);
    sums = take(columns * kWidth);
    staged = take(stage);
  }

  // Whole vectors are stored: what they write behind the end of a row is written over by the next.
  template <typename T>
  void read_keys(Rows<T> keys, Rows<T> values) {
    longest_key = 0;
    for (int64_t k = 0; k < length; ++k) {
      Vec squares(0.f);
      for (int64_t w = 0; w < words; w += kLanes) {
        const Vec v = words_of<kPairs>(keys[k], head_dim, w);
        squares = multiply_add<kPairs>(v, v, squares);
        v.store(key + k * words + w);
      }
      longest_key = larger(lane_sum(squares), longest_key);
    }
    std::fill(key + length * words, key + padded_length * words, 0.f);
    for (int64_t k = 0; k < padded_length; k += kPairs ? 2 : 1) {
      float* to = value + (kPairs ? k / 2 : k) * columns;
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        if constexpr (kPairs) pairs_of(values, k, length, head_dim, d).store(to + d);
        else (k < length ? words_of<kPairs>(values[k], head_dim, d) : Vec(0.f)).store(to + d);
      }
    }
  }

  // `count` rows of queries, transposed into kVectors vectors; returns the largest squared norm.
  template <int64_t kVectors, typename T>
  float read_queries(Rows<T> rows, int64_t count) {
    constexpr int64_t kWidth = kVectors * kLanes;
    Vec squares[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t row = v * kLanes + lane;
        for (int64_t w = 0; w < words; w += kLanes)
          (row < count ? words_of<kPairs>(rows[row], head_dim, w) : Vec(0.f)).store(staged + lane * words + w);
      }
      at::vec::transpose_mxn<float>(staged, words, query + v * kLanes, kWidth, kLanes, words);
      squares[v] = Vec(0.f);
      for (int64_t w = 0; w < words; ++w) {
        const Vec q = Vec::loadu(query + w * kWidth + v * kLanes);
        squares[v] = multiply_add<kPairs>(q, q, squares[v]);
      }
    }
    float longest = 0;
    for (int64_t v = 0; v < kVectors; ++v) {
      float lanes[kLanes];
      squares[v].store(lanes);
      for (int64_t lane = 0; lane < kLanes; ++lane) longest = larger(lanes[lane], longest);
    }
    return longest;
  }

  // Sums of kVectors vectors of queries, into the rows of `count` of them.
  template <int64_t kVectors, typename T>
  void write(T* output, int64_t stride, int64_t count) {
    const int64_t width = round_up(head_dim, kLanes);
    for (int64_t v = 0; v < kVectors; ++v, output += kLanes * stride, count -= kLanes) {
      at::vec::transpose_mxn<float>(sums + v * kLanes, kVectors * kLanes, staged, width, head_dim, kLanes);
      for (int64_t lane = 0; lane < std::min(kLanes, count); ++lane)
        for (int64_t d = 0; d < head_dim; d += kLanes) {
          const Vec v = Vec::loadu(staged + lane * width + d);
          if (d + kLanes <= head_dim) store(output + lane * stride + d, v);
          else store(output + lane * stride + d, v, head_dim - d);
        }
    }
  }
};

template <bool kPairs, int64_t kVectors>
struct Block {
  static constexpr int64_t kWidth = kVectors * kLanes, kTile = tile_of(kVectors), kStep = kPairs ? 2 : 1;
  Workspace<kPairs>& work;
  float scale;  // of the scores, in powers of two

  // Scores of kTile keys from `first` on.
  [[gnu::always_inline]] inline void scores(int64_t first, Vec (&acc)[kTile][kVectors]) const {
    MULTIBETA_UNROLL
    for (int64_t j = 0; j < kTile; ++j)
      MULTIBETA_UNROLL
      for (int64_t v = 0; v < kVectors; ++v) acc[j][v] = Vec(0.f);
    const float* key = work.key + first * work.words;
    const float* query = work.query;
    for (int64_t w = 0; w < work.words; ++w, query += kWidth) {
      Vec q[kVectors];
      MULTIBETA_UNROLL
      for (int64_t v = 0; v < kVectors; ++v) q[v] = Vec::loadu(query + v * kLanes);
      MULTIBETA_UNROLL
      for (int64_t j = 0; j < kTile; ++j) {
        const Vec k = broadcast(key + j * work.words + w);
        MULTIBETA_UNROLL
        for (int64_t v = 0; v < kVectors; ++v) acc[j][v] = multiply_add<kPairs>(q[v], k, acc[j][v]);
      }
    }
  }

  // The largest score of every query; NaN where one is NaN.
  void largest(Vec (&most)[kVectors]) const {
    for (int64_t v = 0; v < kVectors; ++v) most[v] = Vec(-std::numeric_limits<float>::infinity());
    for (int64_t k = 0; k < work.length; k += kTile) {
      Vec score[kTile][kVectors];
      scores(k, score);
      MULTIBETA_UNROLL
      for (int64_t j = 0; j < kTile; ++j)
        MULTIBETA_UNROLL
        for (int64_t v = 0; v < kVectors; ++v)
          if (k + j < work.length) most[v] = at::vec::maximum(most[v], score[j][v]);
    }
  }

  // Weights 2^(scale score + minus) of kTile keys from `first` on, `live` of which exist, and their sum added to `total`.
  template <bool kWhole>
  [[gnu::always_inline]] inline void weigh(int64_t first, int64_t live, const Vec (&minus)[kVectors], Vec (&total)[kVectors],
                                           float* weights) const {
    Vec score[kTile][kVectors];
    scores(first, score);
    const auto weight = [&](int64_t j, int64_t v) {
      return kWhole || j < live ? exp2<!kPairs>(at::vec::fmadd(score[j][v], Vec(scale), minus[v])) : Vec(0.f);
    };
    MULTIBETA_UNROLL
    for (int64_t j = 0; j < kTile; j += kStep)
      MULTIBETA_UNROLL
      for (int64_t v = 0; v < kVectors; ++v) {
        Vec w = weight(j, v);
        total[v] = total[v] + w;
        if constexpr (kPairs) {
          const Vec next = weight(j + 1, v);
          total[v] = total[v] + next;
          w = pair_of(w, next);
        }
        w.store(weights + j / kStep * kWidth + v * kLanes);
      }
  }

  // Weighted means of the values, into `sums`; `safe` scores need no maximum.
  [[gnu::noinline]] void run(bool safe) const {
    Vec minus[kVectors], total[kVectors];
    MULTIBETA_UNROLL
    for (int64_t v = 0; v < kVectors; ++v) minus[v] = total[v] = Vec(0.f);
    if (!safe) {
      largest(minus);
      MULTIBETA_UNROLL
      for (int64_t v = 0; v < kVectors; ++v) minus[v] = minus[v] * Vec(-scale);
    }
    for (int64_t block = 0; block < work.length; block += kKeyBlock) {
      const int64_t end = std::min(block + kKeyBlock, work.length);
      float* weights = work.weights;
      int64_t k = block;
      for (; k + kTile <= end; k += kTile, weights += kTile / kStep * kWidth) weigh<true>(k, kTile, minus, total, weights);
      if (k < end) weigh<false>(k, end - k, minus, total, weights);
      add_values(block / kStep, (end - block + kStep - 1) / kStep, block == 0);
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      const Vec inverse = Vec(1.f) / total[v];
      for (int64_t d = 0; d < work.head_dim; ++d) {
        float* sum = work.sums + d * kWidth + v * kLanes;
        (Vec::loadu(sum) * inverse).store(sum);
      }
    }
  }

  // sums (+)= value^T weights over `rows` rows of words from `first` on.
  void add_values(int64_t first, int64_t rows, bool fresh) const {
    for (int64_t d = 0; d < work.head_dim; d += kTile) {
      float* sums = work.sums + d * kWidth;
      Vec acc[kTile][kVectors];
      MULTIBETA_UNROLL
      for (int64_t j = 0; j < kTile; ++j)
        MULTIBETA_UNROLL
        for (int64_t v = 0; v < kVectors; ++v)
          acc[j][v] = fresh ? Vec(0.f) : Vec::loadu(sums + j * kWidth + v * kLanes);
      const float* value = work.value + first * work.columns + d;
      const float* weights = work.weights;
      for (int64_t k = 0; k < rows; ++k, value += work.columns, weights += kWidth) {
        Vec p[kVectors];
        MULTIBETA_UNROLL
        for (int64_t v = 0; v < kVectors; ++v) p[v] = Vec::loadu(weights + v * kLanes);
        MULTIBETA_UNROLL
        for (int64_t j = 0; j < kTile; ++j) {
          const Vec x = broadcast(value + j);
          MULTIBETA_UNROLL
          for (int64_t v = 0; v < kVectors; ++v) acc[j][v] = multiply_add<kPairs>(p[v], x, acc[j][v]);
        }
      }
      MULTIBETA_UNROLL
      for (int64_t j = 0; j < kTile; ++j)
        MULTIBETA_UNROLL
        for (int64_t v = 0; v < kVectors; ++v) acc[j][v].store(sums + j * kWidth + v * kLanes);
    }
  }
};

// Attention of `count` queries, into rows of `output`.
template <bool kPairs, int64_t kVectors, typename T>
void attend(Workspace<kPairs>& work, Rows<T> queries, int64_t count, T* output, int64_t output_stride) {
  const float scale = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(work.head_dim)));
  const float longest_query = work.template read_queries<kVectors>(queries, count);
  const bool safe = scale * std::sqrt(longest_query) * std::sqrt(work.longest_key) < kSafeExponent;
  Block<kPairs, kVectors>{work, scale}.run(safe);
  work.template write<kVectors>(output, output_stride, count);
}

template <typename T>
void attention_of(const Tensor& query, const Tensor& key, const Tensor& value, Tensor& output) {
  constexpr bool kPairs = kHavePairs && std::is_same_v<T, c10::BFloat16>;
  const int64_t samples = query.size(0), length = query.size(1), heads = query.size(2), head_dim = query.size(3);
  const auto rows = [](const Tensor& t, int64_t n, int64_t h) {
    return Rows<T>{t.const_data_ptr<T>() + n * t.stride(0) + h * t.stride(2), t.stride(1)};
  };
  T* out = output.mutable_data_ptr<T>();
  const int64_t vectors = (length + kLanes - 1) / kLanes, blocks = (vectors + kMaxVectors - 1) / kMaxVectors;
  const int64_t grain = std::max<int64_t>(1, kGrainWork / (2 * length * head_dim * kMaxVectors * kLanes));
  at::parallel_for(0, samples * heads * blocks, grain, [&](int64_t begin, int64_t end) {
    Workspace<kPairs> work(length, head_dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i % blocks, h = i / blocks % heads, n = i / blocks / heads;
      if (i == begin || block == 0) work.read_keys(rows(key, n, h), rows(value, n, h));
      const int64_t first = vectors * block / blocks, size = vectors * (block + 1) / blocks - first;
      auto queries = rows(query, n, h);
      queries.data = queries[first * kLanes];
      T* to = out + ((n * length + first * kLanes) * heads + h) * head_dim;
      const int64_t count = std::min(size * kLanes, length - first * kLanes);
      const auto serve = [&](auto constant) {
        attend<kPairs, decltype(constant)::value>(work, queries, count, to, heads * head_dim);
      };
      if (size == 1) serve(std::integral_constant<int64_t, 1>());
      else if (size == 2) serve(std::integral_constant<int64_t, 2>());
      else if (size == 3) serve(std::integral_constant<int64_t, std::min<int64_t>(3, kMaxVectors)>());
      else serve(std::integral_constant<int64_t, kMaxVectors>());
    }
  });
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value) {
  TORCH_CHECK(query.dim() == 4 && key.sizes() == query.sizes() && value.sizes() == query.sizes(),
              "query, key and value must be (N, L, heads, head_dim), got ", query.sizes(), ", ", key.sizes(), " and ",
              value.sizes());
  const auto type = query.scalar_type();
  TORCH_CHECK((type == at::kFloat || type == at::kBFloat16) && key.scalar_type() == type && value.scalar_type() == type,
              "query, key and value must be all float32 or all bfloat16, got ", type, ", ", key.scalar_type(), " and ",
              value.scalar_type());
  TORCH_CHECK(query.size(3) >= 1 && query.size(3) <= kMaxHeadDim, "head_dim must lie in [1, ", kMaxHeadDim, "], got ",
              query.size(3));
  for (const Tensor* t : {&query, &key, &value})
    TORCH_CHECK(t->stride(3) == 1 || t->size(3) == 1, "head_dim must have stride 1, got ", t->stride(3));
  Tensor output = at::empty(query.sizes(), value.options());
  if (output.numel() == 0) return output;
  if (type == at::kFloat) attention_of<float>(query, key, value, output);
  else attention_of<c10::BFloat16>(query, key, value, output);
  return output;
}

TORCH_LIBRARY_FRAGMENT(multibeta, m) { m.def("attention_cpp(Tensor query, Tensor key, Tensor value) -> Tensor"); }

TORCH_LIBRARY_IMPL(multibeta, CPU, m) { m.impl("attention_cpp", attention); }

}  // namespace
}  // namespace multibeta
