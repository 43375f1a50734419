// activation(GroupNorm(x + residual + shift)) and its gradient, float32 and bfloat16, channels-last and contiguous.
//
// Statistics are sums of deviations from an element of the same short series, merged by Chan's formula, so a mean of 300
// deviations costs no digits. What is summed together depends on the shape of one sample only: results are the same bit for
// bit for any number of threads and any batch around the sample.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "vectors.h"

namespace multibeta {
namespace {

using at::Tensor;

constexpr int64_t kBlock = 32;              // rows whose deviations are summed before a merge
constexpr int64_t kChunkElements = 32768;   // rows of a task, and the least work worth a thread
constexpr int64_t kStreamBytes = 24 << 20;  // beyond the last-level cache, stores bypass it

struct Sizes {
  int64_t samples, channels, pixels, groups;
  int64_t row = channels;  // of the output: more where it is a slice of a larger channels-last tensor
  int64_t group_channels() const { return channels / groups; }
  int64_t padded() const { return (channels + 15) / 16 * 16; }  // rows of scratch start on a cache line
  // a channels-last sample is cut into chunks of rows; a slice is cut as the tensor it is of, for the same numbers
  int64_t chunk_rows() const {
    const int64_t rows = std::max((kChunkElements / row + kBlock - 1) / kBlock, int64_t{1}) * kBlock;
    return std::min(rows, pixels);
  }
  int64_t chunks() const { return (pixels + chunk_rows() - 1) / chunk_rows(); }
  int64_t rows_of(int64_t chunk) const { return std::min(chunk_rows(), pixels - chunk * chunk_rows()); }
};

// A vector or matrix of float32 or bfloat16, any strides, read as float32.
struct Rows {
  const float* wide = nullptr;
  const c10::BFloat16* narrow = nullptr;
  int64_t row_stride = 0, stride = 0;

  explicit Rows(const Tensor& t) {
    if (t.scalar_type() == at::kFloat) wide = t.const_data_ptr<float>();
    else narrow = t.const_data_ptr<c10::BFloat16>();
    row_stride = t.dim() == 2 ? t.stride(0) : 0;
    stride = t.stride(-1);
  }
  void read(int64_t row, int64_t count, float* out) const {
    const int64_t offset = row * row_stride;
    if (wide) for (int64_t i = 0; i < count; ++i) out[i] = wide[offset + i * stride];
    else for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(narrow[offset + i * stride]);
  }
};

void read_shift(const std::optional<Tensor>& shift, int64_t sample, int64_t count, float* out) {
  if (shift) Rows(*shift).read(sample, count, out);
  else std::fill_n(out, count, 0.f);
}

// Runs body(n, chunk) for all chunks, then finish(n), then apply(n, chunk), spread over samples if they suffice, else over chunks.
template <typename Body, typename Finish, typename Apply>
void over_chunks(const Sizes& sizes, const Body& body, const Finish& finish, const Apply& apply) {
  const int64_t chunks = sizes.chunks();
  const int64_t grain = std::max<int64_t>(1, kChunkElements / (sizes.channels * sizes.pixels));
  if (chunks == 1 || sizes.samples >= at::get_num_threads()) {
    at::parallel_for(0, sizes.samples, grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t k = 0; k < chunks; ++k) body(n, k);
        finish(n);
        for (int64_t k = chunks - 1; k >= 0; --k) apply(n, k);  // backwards: the last rows are still in cache
      }
      stream_fence();
    });
    return;
  }
  at::parallel_for(0, sizes.samples * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / chunks, i % chunks);
  });
  at::parallel_for(0, sizes.samples, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) finish(n);
  });
  at::parallel_for(0, sizes.samples * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) apply(i / chunks, i % chunks);
    stream_fence();
  });
}

// x, or x + residual rounded to T and kept in total.
template <bool kResidual, typename T>
inline Vec load_total(const T* x, const T* residual, T* total, int64_t i) {
  if constexpr (!kResidual) return load(x + i);
  store(total + i, load(x + i) + load(residual + i));
  return load(total + i);
}

template <bool kResidual, typename T>
inline Vec load_total(const T* x, const T* residual, T* total, int64_t i, int64_t count) {
  if constexpr (!kResidual) return load(x + i, count);
  store(total + i, load(x + i, count) + load(residual + i, count), count);
  return load(total + i, count);
}

// Chan's formula for a running (mean, squares) of `count` values and a new one of `added` values, lane by lane.
struct Merge {
  float mean_weight, square_weight;
  Merge(int64_t count, int64_t added)
      : mean_weight(static_cast<float>(added) / (count + added)), square_weight(mean_weight * count) {}
  void operator()(Vec& mean, Vec& squares, Vec new_mean, Vec new_squares) const {
    const Vec delta = new_mean - mean;
    mean = at::vec::fmadd(delta, Vec(mean_weight), mean);
    squares = squares + at::vec::fmadd(delta * delta, Vec(square_weight), new_squares);
  }
};

// ---- channels-last, forward

// Moments of kWidth vectors of channels over a block of rows, merged into mean (relative to origin) and squares.
template <int kWidth, bool kResidual, typename T>
inline void block_moments(const T* x, const T* residual, T* total, const float* origin, int64_t rows, int64_t channels,
                          int64_t already, float* mean, float* squares) {
  Vec pivot[kWidth], first[kWidth], second[kWidth];
  for (int v = 0; v < kWidth; ++v) {
    pivot[v] = load_total<kResidual>(x, residual, total, v * kLanes);
    first[v] = second[v] = Vec(0.f);
  }
  for (int64_t r = 1; r < rows; ++r) {
    for (int v = 0; v < kWidth; ++v) {
      const Vec d = load_total<kResidual>(x, residual, total, r * channels + v * kLanes) - pivot[v];
      first[v] = first[v] + d;
      second[v] = at::vec::fmadd(d, d, second[v]);
    }
  }
  const Vec inverse(1.f / rows);
  const Merge merge(already, rows);
  for (int v = 0; v < kWidth; ++v) {
    const Vec d = first[v] * inverse;
    const Vec new_squares = at::vec::fnmadd(d, first[v], second[v]);
    const Vec new_mean = (pivot[v] - load(origin + v * kLanes)) + d;
    Vec m(0.f), s(0.f);
    if (already) m = load(mean + v * kLanes), s = load(squares + v * kLanes);
    merge(m, s, new_mean, new_squares);
    store(mean + v * kLanes, m);
    store(squares + v * kLanes, s);
  }
}

template <bool kResidual, typename T>
inline void block_moments_tail(const T* x, const T* residual, T* total, const float* origin, int64_t rows, int64_t channels,
                               int64_t already, float* mean, float* squares, int64_t count) {
  const Vec pivot = load_total<kResidual>(x, residual, total, 0, count);
  Vec first(0.f), second(0.f);
  for (int64_t r = 1; r < rows; ++r) {
    const Vec d = load_total<kResidual>(x, residual, total, r * channels, count) - pivot;
    first = first + d;
    second = at::vec::fmadd(d, d, second);
  }
  const Vec d = first * Vec(1.f / rows);
  Vec m(0.f), s(0.f);
  if (already) m = load(mean, count), s = load(squares, count);
  Merge(already, rows)(m, s, (pivot - load(origin, count)) + d, at::vec::fnmadd(d, first, second));
  store(mean, m, count);
  store(squares, s, count);
}

template <bool kResidual, typename T>
void chunk_moments(const T* x, const T* residual, T* total, const float* origin, int64_t rows, int64_t channels, float* mean,
                   float* squares) {
  constexpr int64_t kWide = 4 * kLanes;
  for (int64_t r = 0; r < rows; r += kBlock) {
    const int64_t count = std::min(kBlock, rows - r), at = r * channels;
    int64_t c = 0;
    for (; c + kWide <= channels; c += kWide)
      block_moments<4, kResidual>(x + at + c, residual + at + c, total + at + c, origin + c, count, channels, r, mean + c,
                                  squares + c);
    for (; c + kLanes <= channels; c += kLanes)
      block_moments<1, kResidual>(x + at + c, residual + at + c, total + at + c, origin + c, count, channels, r, mean + c,
                                  squares + c);
    if (c < channels)
      block_moments_tail<kResidual>(x + at + c, residual + at + c, total + at + c, origin + c, count, channels, r, mean + c,
                                    squares + c, channels - c);
  }
}

template <int kActivation, bool kStream, typename T>
void apply_rows(const T* x, T* y, const float* scale, const float* offset, int64_t rows, int64_t channels, int64_t y_row) {
  for (int64_t r = 0; r < rows; ++r, x += channels, y += y_row) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
      const Vec u = at::vec::fmadd(load(x + c), load(scale + c), load(offset + c));
      const Vec v = at::vec::fmadd(load(x + c + kLanes), load(scale + c + kLanes), load(offset + c + kLanes));
      store_pair<kStream>(y + c, activate<kActivation, T>(u), activate<kActivation, T>(v));
    }
    for (; c < channels; c += kLanes) {
      const int64_t count = std::min(kLanes, channels - c);
      const Vec u = at::vec::fmadd(load(x + c, count), load(scale + c, count), load(offset + c, count));
      store(y + c, activate<kActivation, T>(u), count);
    }
  }
}

struct Affine {  // of one call, as float32
  const float *weight, *bias;
};

// y = activation(scale x + offset) per channel, and the statistics, of one sample with per-channel moments.
void combine_channels(const Sizes& sizes, const float* origin, const float* mean, const float* squares, const float* shift,
                      Affine affine, double eps, float* scale, float* offset, float* group_mean, float* group_rstd) {
  const int64_t width = sizes.group_channels();
  const double pixels = static_cast<double>(sizes.pixels);
  for (int64_t g = 0; g < sizes.groups; ++g) {
    const int64_t begin = g * width, end = begin + width;
    double sum = 0, spread = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = begin; c < end; ++c) sum += static_cast<double>(origin[c]) + mean[c] + shift[c];
    const double centre = sum / width;
#pragma omp simd reduction(+ : spread)
    for (int64_t c = begin; c < end; ++c) {
      const double d = static_cast<double>(origin[c]) + mean[c] + shift[c] - centre;
      spread += squares[c] + pixels * d * d;
    }
    const double rstd = 1 / std::sqrt(spread / (width * pixels) + eps);
    group_mean[g] = static_cast<float>(centre);
    group_rstd[g] = static_cast<float>(rstd);
#pragma omp simd
    for (int64_t c = begin; c < end; ++c) {
      const double a = affine.weight[c] * rstd;
      scale[c] = static_cast<float>(a);
      offset[c] = static_cast<float>(affine.bias[c] + (shift[c] - centre) * a);
    }
  }
}

template <int kActivation, bool kResidual, typename T>
void forward_channels_last(const Sizes& sizes, const T* x, const T* residual, T* total, T* y, Affine affine, double eps,
                           const std::optional<Tensor>& shift, float* group_mean, float* group_rstd) {
  const int64_t chunks = sizes.chunks(), padded = sizes.padded(), channels = sizes.channels;
  const int64_t per_sample = channels * sizes.pixels, per_chunk = channels * sizes.chunk_rows();
  // per sample: origin, shift, scale, offset, then mean and squares of each chunk
  const int64_t stride = (4 + 2 * chunks) * padded;
  const Tensor scratch = at::empty({sizes.samples * stride}, at::kFloat);
  float* base = scratch.mutable_data_ptr<float>();
  const int64_t row_bytes = sizes.row * static_cast<int64_t>(sizeof(T));
  const bool stream = sizes.samples * sizes.pixels * row_bytes > kStreamBytes && channels % (2 * kLanes) == 0 &&
                      row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  for (int64_t n = 0; n < sizes.samples; ++n) {  // the chunks of a sample share one origin, its first row
    float* origin = base + n * stride;
    for (int64_t c = 0; c < channels; ++c) {
      origin[c] = static_cast<float>(x[n * per_sample + c]);
      if constexpr (kResidual)
        origin[c] = static_cast<float>(static_cast<T>(origin[c] + static_cast<float>(residual[n * per_sample + c])));
    }
    read_shift(shift, n, channels, origin + padded);
  }
  over_chunks(
      sizes,
      [&](int64_t n, int64_t k) {
        float* origin = base + n * stride;
        float* mean = origin + (4 + 2 * k) * padded;
        const int64_t at = n * per_sample + k * per_chunk;
        chunk_moments<kResidual>(x + at, residual + at, total + at, origin, sizes.rows_of(k), channels, mean, mean + padded);
      },
      [&](int64_t n) {
        float* origin = base + n * stride;
        float *scale = origin + 2 * padded, *offset = origin + 3 * padded, *mean = origin + 4 * padded;
        for (int64_t k = 1; k < chunks; ++k) {
          const float* next = mean + 2 * k * padded;
          const Merge merge(k * sizes.chunk_rows(), sizes.rows_of(k));
          for (int64_t c = 0; c < channels; c += kLanes) {
            const int64_t some = std::min(kLanes, channels - c);
            Vec m = load(mean + c, some), s = load(mean + padded + c, some);
            merge(m, s, load(next + c, some), load(next + padded + c, some));
            store(mean + c, m, some);
            store(mean + padded + c, s, some);
          }
        }
        combine_channels(sizes, origin, mean, mean + padded, origin + padded, affine, eps, scale, offset,
                         group_mean + n * sizes.groups, group_rstd + n * sizes.groups);
      },
      [&](int64_t n, int64_t k) {
        const float *scale = base + n * stride + 2 * padded, *offset = scale + padded;
        const int64_t at = n * per_sample + k * per_chunk, rows = sizes.rows_of(k);
        const T* source = (kResidual ? total : x) + at;
        T* target = y + (n * sizes.pixels + k * sizes.chunk_rows()) * sizes.row;
        if (stream) apply_rows<kActivation, true>(source, target, scale, offset, rows, channels, sizes.row);
        else apply_rows<kActivation, false>(source, target, scale, offset, rows, channels, sizes.row);
      });
}

// ---- contiguous, forward

// Mean (relative to origin) and sum of squares of one group: lanes are separate series until the end.
template <bool kResidual, typename T>
std::pair<double, double> group_moments(const T* x, const T* residual, T* total, float origin, const float* shift,
                                        int64_t channels, int64_t pixels) {
  const int64_t whole = pixels / kLanes, rest = pixels % kLanes;
  Vec mean(0.f), squares(0.f);
  int64_t count = 0;
  double tail_mean = 0, tail_squares = 0;
  int64_t tail_count = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t at = c * pixels;
    for (int64_t v = 0; v < whole; v += kBlock) {
      const int64_t rows = std::min(kBlock, whole - v);
      const int64_t begin = at + v * kLanes;
      const Vec pivot = load_total<kResidual>(x, residual, total, begin);
      Vec first[4], second[4];
      for (int j = 0; j < 4; ++j) first[j] = second[j] = Vec(0.f);
      const auto add = [&](int j, int64_t r) {
        const Vec d = load_total<kResidual>(x, residual, total, begin + r * kLanes) - pivot;
        first[j] = first[j] + d;
        second[j] = at::vec::fmadd(d, d, second[j]);
      };
      int64_t r = 1;
      for (; r + 4 <= rows; r += 4) add(0, r), add(1, r + 1), add(2, r + 2), add(3, r + 3);
      for (; r < rows; ++r) add(0, r);
      const Vec sum = (first[0] + first[1]) + (first[2] + first[3]);
      const Vec d = sum * Vec(1.f / rows);
      const Vec new_squares = at::vec::fnmadd(d, sum, (second[0] + second[1]) + (second[2] + second[3]));
      Merge(count, rows)(mean, squares, (pivot - Vec(origin)) + Vec(shift[c]) + d, new_squares);
      count += rows;
    }
    for (int64_t i = at + whole * kLanes; i < at + pixels; ++i) {
      float value = static_cast<float>(x[i]);
      if constexpr (kResidual) {
        total[i] = static_cast<T>(value + static_cast<float>(residual[i]));
        value = static_cast<float>(total[i]);
      }
      const double d = static_cast<double>(value) - origin + shift[c] - tail_mean;
      tail_mean += d / ++tail_count;
      tail_squares += d * (static_cast<double>(value) - origin + shift[c] - tail_mean);
    }
  }
  if (count == 0) return {tail_mean, tail_squares};
  float lane_mean[kLanes], lane_squares[kLanes];
  mean.store(lane_mean);
  squares.store(lane_squares);
  double sum = 0, spread = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += lane_mean[i];
  const double lanes_mean = sum / kLanes;
  for (int64_t i = 0; i < kLanes; ++i) {
    const double d = lane_mean[i] - lanes_mean;
    spread += lane_squares[i] + count * d * d;
  }
  if (rest == 0) return {lanes_mean, spread};
  const double n = static_cast<double>(count * kLanes), all = n + tail_count, delta = tail_mean - lanes_mean;
  return {lanes_mean + delta * tail_count / all, spread + tail_squares + delta * delta * n * tail_count / all};
}

template <int kActivation, bool kStream, typename T>
void apply_row(const T* x, T* y, float scale, float offset, int64_t count) {
  const Vec a(scale), b(offset);
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Vec u = at::vec::fmadd(load(x + i), a, b), v = at::vec::fmadd(load(x + i + kLanes), a, b);
    store_pair<kStream>(y + i, activate<kActivation, T>(u), activate<kActivation, T>(v));
  }
  for (; i < count; i += kLanes) {
    const int64_t some = std::min(kLanes, count - i);
    store(y + i, activate<kActivation, T>(at::vec::fmadd(load(x + i, some), a, b)), some);
  }
}

template <int kActivation, bool kResidual, typename T>
void forward_contiguous(const Sizes& sizes, const T* x, const T* residual, T* total, T* y, Affine affine, double eps,
                        const std::optional<Tensor>& shift, float* group_mean, float* group_rstd) {
  const int64_t width = sizes.group_channels(), per_group = width * sizes.pixels;
  const int64_t grain = std::max<int64_t>(1, kChunkElements / per_group);
  const bool stream = sizes.samples * sizes.groups * per_group * static_cast<int64_t>(sizeof(T)) > kStreamBytes &&
                      sizes.pixels % (2 * kLanes) == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  const Tensor scratch = at::empty({sizes.samples, sizes.channels}, at::kFloat);
  float* shifts = scratch.mutable_data_ptr<float>();
  for (int64_t n = 0; n < sizes.samples; ++n) read_shift(shift, n, sizes.channels, shifts + n * sizes.channels);
  at::parallel_for(0, sizes.samples * sizes.groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i % sizes.groups, at = i * per_group;
      const float* shift_row = shifts + i * width;
      float origin = static_cast<float>(x[at]);
      if constexpr (kResidual) origin = static_cast<float>(static_cast<T>(origin + static_cast<float>(residual[at])));
      const auto [mean, squares] =
          group_moments<kResidual>(x + at, residual + at, total + at, origin, shift_row, width, sizes.pixels);
      const double centre = origin + mean, rstd = 1 / std::sqrt(squares / per_group + eps);
      group_mean[i] = static_cast<float>(centre);
      group_rstd[i] = static_cast<float>(rstd);
      for (int64_t c = 0; c < width; ++c) {
        const double a = affine.weight[g * width + c] * rstd;
        const float scale = static_cast<float>(a);
        const float offset = static_cast<float>(affine.bias[g * width + c] + (shift_row[c] - centre) * a);
        const int64_t row = at + c * sizes.pixels;
        const T* source = (kResidual ? total : x) + row;
        if (stream) apply_row<kActivation, true>(source, y + row, scale, offset, sizes.pixels);
        else apply_row<kActivation, false>(source, y + row, scale, offset, sizes.pixels);
      }
    }
    stream_fence();
  });
}

// ---- backward
//
// With xhat = (x + shift - mean) rstd, u = weight xhat + bias and g = grad activation'(u), per channel S1 = sum g and
// S2 = sum g xhat; A and B are the means of weight S1 and weight S2 over the group:
//     grad_x = rstd (weight g - A - xhat B),    grad_weight = sum_n S2,    grad_bias = sum_n S1.

struct ChannelTerms {  // of one sample, (C,) each
  const float *scale, *offset;            // u = scale x + offset
  const float *rstd, *minus;              // xhat = rstd x + minus
  const float *on_gradient, *on_x, *rest; // grad_x = on_gradient g + on_x x + rest
};

template <int kActivation, typename T>
inline Vec slope_times(Vec grad, Vec x, Vec scale, Vec offset) {
  return grad * activation_slope<kActivation, T>(at::vec::fmadd(x, scale, offset));
}

// Adds to the sums of kWidth vectors of channels from c on, the last of `lanes` channels, over a block of rows.
template <int kActivation, int kWidth, typename T>
inline void block_sums(const T* grad, const T* x, const ChannelTerms& terms, int64_t c, int64_t rows, int64_t channels, float* s1,
                       float* s2, float* s3, int64_t lanes) {
  Vec scale[kWidth], offset[kWidth], rstd[kWidth], minus[kWidth], first[kWidth], second[kWidth], third[kWidth];
  for (int v = 0; v < kWidth; ++v) {
    const int64_t at = c + v * kLanes;
    scale[v] = load(terms.scale + at, lanes), offset[v] = load(terms.offset + at, lanes);
    rstd[v] = load(terms.rstd + at, lanes), minus[v] = load(terms.minus + at, lanes);
    first[v] = second[v] = third[v] = Vec(0.f);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kWidth; ++v) {
      const int64_t at = r * channels + v * kLanes;
      const Vec value = kWidth > 1 ? load(x + at) : load(x + at, lanes);
      const Vec dy = kWidth > 1 ? load(grad + at) : load(grad + at, lanes);
      const Vec g = slope_times<kActivation, T>(dy, value, scale[v], offset[v]);
      const Vec xhat = at::vec::fmadd(value, rstd[v], minus[v]);
      first[v] = first[v] + g;
      second[v] = at::vec::fmadd(g, xhat, second[v]);
      third[v] = third[v] + xhat;
    }
  }
  for (int v = 0; v < kWidth; ++v) {
    const int64_t at = c + v * kLanes;
    store(s1 + at, load(s1 + at, lanes) + first[v], lanes);
    store(s2 + at, load(s2 + at, lanes) + second[v], lanes);
    store(s3 + at, load(s3 + at, lanes) + third[v], lanes);
  }
}

template <int kActivation, typename T>
void chunk_sums(const T* grad, const T* x, ChannelTerms terms, int64_t rows, int64_t channels, float* sums, int64_t padded) {
  float *s1 = sums, *s2 = sums + padded, *s3 = sums + 2 * padded;
  for (float* s : {s1, s2, s3}) std::fill_n(s, channels, 0.f);
  for (int64_t r = 0; r < rows; r += kBlock) {
    const int64_t count = std::min(rows - r, kBlock), at = r * channels;
    int64_t c = 0;
    for (; c + 2 * kLanes <= channels; c += 2 * kLanes)
      block_sums<kActivation, 2>(grad + at + c, x + at + c, terms, c, count, channels, s1, s2, s3, kLanes);
    for (; c < channels; c += kLanes)
      block_sums<kActivation, 1>(grad + at + c, x + at + c, terms, c, count, channels, s1, s2, s3,
                                 std::min(kLanes, channels - c));
  }
}

template <int kActivation, typename T>
void gradient_rows(const T* grad, const T* x, T* out, ChannelTerms terms, int64_t rows, int64_t channels) {
  for (int64_t r = 0; r < rows; ++r, grad += channels, x += channels, out += channels) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
      const auto one = [&](int64_t i) {
        const Vec v = load(x + i), g = slope_times<kActivation, T>(load(grad + i), v, load(terms.scale + i), load(terms.offset + i));
        return at::vec::fmadd(g, load(terms.on_gradient + i), at::vec::fmadd(v, load(terms.on_x + i), load(terms.rest + i)));
      };
      store_pair<false>(out + c, one(c), one(c + kLanes));
    }
    for (; c < channels; c += kLanes) {
      const int64_t some = std::min(kLanes, channels - c);
      const Vec v = load(x + c, some), g = slope_times<kActivation, T>(load(grad + c, some), v, load(terms.scale + c, some),
                                                                       load(terms.offset + c, some));
      store(out + c,
            at::vec::fmadd(g, load(terms.on_gradient + c, some),
                           at::vec::fmadd(v, load(terms.on_x + c, some), load(terms.rest + c, some))),
            some);
    }
  }
}

// Scratch of one sample in the backward pass: rows of `padded` floats.
enum BackwardRow { kScale, kOffset, kRstd, kMinus, kOnGradient, kOnX, kRest, kShift, kBackwardRows };

void fill_terms(const Sizes& sizes, Affine affine, const float* mean, const float* rstd, float* rows) {
  const int64_t padded = sizes.padded(), width = sizes.group_channels();
  std::fill_n(rows, kShift * padded, 0.f);
  const float* shift = rows + kShift * padded;
  for (int64_t g = 0; g < sizes.groups; ++g) {
    const double deviation = rstd[g], centre = mean[g];
#pragma omp simd
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const double minus = (shift[c] - centre) * deviation;
      rows[kRstd * padded + c] = static_cast<float>(deviation);
      rows[kMinus * padded + c] = static_cast<float>(minus);
      rows[kScale * padded + c] = static_cast<float>(affine.weight[c] * deviation);
      rows[kOffset * padded + c] = static_cast<float>(affine.bias[c] + affine.weight[c] * minus);
    }
  }
}

ChannelTerms terms_of(const float* rows, int64_t padded) {
  return {rows + kScale * padded,      rows + kOffset * padded, rows + kRstd * padded, rows + kMinus * padded,
          rows + kOnGradient * padded, rows + kOnX * padded,    rows + kRest * padded};
}

// From the sums of one group to the coefficients of grad_x, and the gradient of the shift.
void group_gradient(const Sizes& sizes, Affine affine, int64_t group, const double* s1, const double* s2, const double* s3,
                    float* rows, float* shift_gradient) {
  const int64_t width = sizes.group_channels(), padded = sizes.padded(), begin = group * width;
  double mean1 = 0, mean2 = 0;
  for (int64_t c = 0; c < width; ++c) {
    mean1 += affine.weight[begin + c] * s1[c];
    mean2 += affine.weight[begin + c] * s2[c];
  }
  const double count = static_cast<double>(width) * sizes.pixels;
  mean1 /= count;
  mean2 /= count;
  for (int64_t c = 0; c < width; ++c) {
    const int64_t channel = begin + c;
    const double rstd = rows[kRstd * padded + channel], minus = rows[kMinus * padded + channel];
    rows[kOnGradient * padded + channel] = static_cast<float>(affine.weight[channel] * rstd);
    rows[kOnX * padded + channel] = static_cast<float>(-rstd * rstd * mean2);
    rows[kRest * padded + channel] = static_cast<float>(-rstd * (mean1 + minus * mean2));
    if (shift_gradient)
      shift_gradient[channel] =
          static_cast<float>(rstd * (affine.weight[channel] * s1[c] - sizes.pixels * mean1 - mean2 * s3[c]));
  }
}

template <int kActivation, typename T>
void backward_channels_last(const Sizes& sizes, const T* grad, const T* x, T* grad_x, Affine affine, const float* mean,
                            const float* rstd, const std::optional<Tensor>& shift, float* sample_sums, float* shift_gradient) {
  const int64_t chunks = sizes.chunks(), padded = sizes.padded(), channels = sizes.channels, width = sizes.group_channels();
  const int64_t per_sample = channels * sizes.pixels, per_chunk = channels * sizes.chunk_rows();
  const int64_t stride = (kBackwardRows + 3 * chunks) * padded;
  const Tensor scratch = at::empty({sizes.samples * stride}, at::kFloat);
  float* base = scratch.mutable_data_ptr<float>();
  for (int64_t n = 0; n < sizes.samples; ++n) {
    read_shift(shift, n, channels, base + n * stride + kShift * padded);
    fill_terms(sizes, affine, mean + n * sizes.groups, rstd + n * sizes.groups, base + n * stride);
  }
  over_chunks(
      sizes,
      [&](int64_t n, int64_t k) {
        float* rows = base + n * stride;
        const int64_t at = n * per_sample + k * per_chunk;
        chunk_sums<kActivation>(grad + at, x + at, terms_of(rows, padded), sizes.rows_of(k), channels,
                                rows + (kBackwardRows + 3 * k) * padded, padded);
      },
      [&](int64_t n) {
        float* rows = base + n * stride;
        std::vector<double> sums(3 * width);
        for (int64_t g = 0; g < sizes.groups; ++g) {
          std::fill(sums.begin(), sums.end(), 0.);
          for (int64_t k = 0; k < chunks; ++k)
            for (int64_t s = 0; s < 3; ++s)
              for (int64_t c = 0; c < width; ++c)
                sums[s * width + c] += rows[(kBackwardRows + 3 * k + s) * padded + g * width + c];
          group_gradient(sizes, affine, g, sums.data(), sums.data() + width, sums.data() + 2 * width, rows,
                         shift_gradient ? shift_gradient + n * channels : nullptr);
          for (int64_t s = 0; s < 2; ++s)
            for (int64_t c = 0; c < width; ++c)
              sample_sums[(2 * n + s) * channels + g * width + c] = static_cast<float>(sums[s * width + c]);
        }
      },
      [&](int64_t n, int64_t k) {
        const int64_t at = n * per_sample + k * per_chunk;
        gradient_rows<kActivation>(grad + at, x + at, grad_x + at, terms_of(base + n * stride, padded),
                                   sizes.rows_of(k), channels);
      });
}

template <int kActivation, typename T>
void backward_contiguous(const Sizes& sizes, const T* grad, const T* x, T* grad_x, Affine affine, const float* mean,
                         const float* rstd, const std::optional<Tensor>& shift, float* sample_sums, float* shift_gradient) {
  const int64_t padded = sizes.padded(), width = sizes.group_channels(), pixels = sizes.pixels;
  const int64_t per_group = width * pixels, stride = kBackwardRows * padded;
  const Tensor scratch = at::empty({sizes.samples * stride}, at::kFloat);
  float* base = scratch.mutable_data_ptr<float>();
  for (int64_t n = 0; n < sizes.samples; ++n) {
    read_shift(shift, n, sizes.channels, base + n * stride + kShift * padded);
    fill_terms(sizes, affine, mean + n * sizes.groups, rstd + n * sizes.groups, base + n * stride);
  }
  const int64_t grain = std::max<int64_t>(1, kChunkElements / per_group);
  at::parallel_for(0, sizes.samples * sizes.groups, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(3 * width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / sizes.groups, g = i % sizes.groups;
      float* rows = base + n * stride;
      for (int64_t c = 0; c < width; ++c) {
        const int64_t channel = g * width + c, at = i * per_group + c * pixels;
        const Vec scale(rows[kScale * padded + channel]), offset(rows[kOffset * padded + channel]);
        const Vec deviation(rows[kRstd * padded + channel]), minus(rows[kMinus * padded + channel]);
        double s1 = 0, s2 = 0, s3 = 0;
        for (int64_t p0 = 0; p0 < pixels; p0 += 4 * kBlock * kLanes) {
          const int64_t p1 = std::min(pixels, p0 + 4 * kBlock * kLanes);
          Vec a(0.f), b(0.f), d(0.f);
          int64_t p = p0;
          for (; p + kLanes <= p1; p += kLanes) {
            const Vec v = load(x + at + p), xhat = at::vec::fmadd(v, deviation, minus);
            const Vec gradient = slope_times<kActivation, T>(load(grad + at + p), v, scale, offset);
            a = a + gradient;
            b = at::vec::fmadd(gradient, xhat, b);
            d = d + xhat;
          }
          s1 += lane_sum(a), s2 += lane_sum(b), s3 += lane_sum(d);
          if (p < p1) {
            const Vec v = load(x + at + p, p1 - p), xhat = at::vec::fmadd(v, deviation, minus);
            const Vec gradient = slope_times<kActivation, T>(load(grad + at + p, p1 - p), v, scale, offset);
            float lanes[2][kLanes];
            gradient.store(lanes[0]);
            xhat.store(lanes[1]);
            for (int64_t l = 0; l < p1 - p; ++l)
              s1 += lanes[0][l], s2 += static_cast<double>(lanes[0][l]) * lanes[1][l], s3 += lanes[1][l];
          }
        }
        sums[c] = s1, sums[width + c] = s2, sums[2 * width + c] = s3;
        sample_sums[2 * n * sizes.channels + channel] = static_cast<float>(s1);
        sample_sums[(2 * n + 1) * sizes.channels + channel] = static_cast<float>(s2);
      }
      group_gradient(sizes, affine, g, sums.data(), sums.data() + width, sums.data() + 2 * width, rows,
                     shift_gradient ? shift_gradient + n * sizes.channels : nullptr);
      for (int64_t c = 0; c < width; ++c) {
        const int64_t channel = g * width + c, at = i * per_group + c * pixels;
        const Vec scale(rows[kScale * padded + channel]), offset(rows[kOffset * padded + channel]);
        const Vec on_gradient(rows[kOnGradient * padded + channel]), on_x(rows[kOnX * padded + channel]),
            rest(rows[kRest * padded + channel]);
        const auto one = [&](Vec dy, Vec v) {
          const Vec gradient = slope_times<kActivation, T>(dy, v, scale, offset);
          return at::vec::fmadd(gradient, on_gradient, at::vec::fmadd(v, on_x, rest));
        };
        int64_t p = 0;
        for (; p + kLanes <= pixels; p += kLanes) store(grad_x + at + p, one(load(grad + at + p), load(x + at + p)));
        if (p < pixels)
          store(grad_x + at + p, one(load(grad + at + p, pixels - p), load(x + at + p, pixels - p)), pixels - p);
      }
    }
  });
}

// ---- the operators

int activation_of(std::string_view name) {
  if (name == "none") return kNone;
  if (name == "silu") return kSilu;
  TORCH_CHECK(name == "sigmoid", "activation must be one of sigmoid, silu, none, got ", std::string(name));
  return kSigmoid;
}

template <typename F>
void with_activation(int activation, const F& f) {
  if (activation == kNone) f(std::integral_constant<int, kNone>());
  else if (activation == kSilu) f(std::integral_constant<int, kSilu>());
  else f(std::integral_constant<int, kSigmoid>());
}

void check_types(const Tensor& x, std::initializer_list<const Tensor*> others) {
  const auto known = [](const Tensor& t) { return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16; };
  TORCH_CHECK(x.dim() == 4 && known(x), "x must be (N, C, H, W), float32 or bfloat16");
  for (const Tensor* t : others) TORCH_CHECK(known(*t), "parameters and shift must be float32 or bfloat16");
}

// Weight and bias as float32 on one buffer.
struct AffineBuffer {
  Tensor buffer;
  Affine affine;
  AffineBuffer(const Tensor& weight, const Tensor& bias, int64_t channels) : buffer(at::empty({2, channels}, at::kFloat)) {
    TORCH_CHECK(weight.numel() == channels && bias.numel() == channels, "weight and bias must be (C,)");
    float* data = buffer.mutable_data_ptr<float>();
    Rows(weight).read(0, channels, data);
    Rows(bias).read(0, channels, data + channels);
    affine = {data, data + channels};
  }
};

at::MemoryFormat format_of(const Tensor& x) {
  return x.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

bool rows_are_pixels(const Tensor& x, int64_t pixels) { return format_of(x) == at::MemoryFormat::ChannelsLast || pixels == 1; }

void check_shift(const std::optional<Tensor>& shift, const Sizes& sizes) {
  if (!shift) return;
  TORCH_CHECK(shift->dim() == 2 && shift->size(0) == sizes.samples && shift->size(1) == sizes.channels, "shift must be (N, C)");
  TORCH_CHECK(shift->scalar_type() == at::kFloat || shift->scalar_type() == at::kBFloat16, "shift must be float32 or bfloat16");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_act(const Tensor& given, const Tensor& weight, const Tensor& bias,
                                                          int64_t num_groups, double eps, const std::optional<Tensor>& shift,
                                                          const std::optional<Tensor>& residual, std::string_view activation) {
  check_types(given, {&weight, &bias});
  const auto format = format_of(given);
  const Tensor x = given.contiguous(format);
  const Sizes sizes{x.size(0), x.size(1), x.size(2) * x.size(3), num_groups};
  TORCH_CHECK(num_groups > 0 && sizes.channels % num_groups == 0, "channels must divide into groups");
  check_shift(shift, sizes);
  Tensor y = at::empty_like(x, x.options(), format), total, added;
  if (residual) {
    TORCH_CHECK(residual->sizes() == x.sizes() && residual->scalar_type() == x.scalar_type(), "residual must be like x");
    added = residual->contiguous(format);
    total = at::empty_like(y);
  } else {
    total = at::empty({0}, x.options());
  }
  Tensor mean = at::empty({sizes.samples, num_groups}, at::kFloat), rstd = at::empty({sizes.samples, num_groups}, at::kFloat);
  const AffineBuffer parameters(weight, bias, sizes.channels);
  const auto serve = [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto kind, auto with_residual) {
      constexpr int kActivation = decltype(kind)::value;
      constexpr bool kResidual = decltype(with_residual)::value;
      const auto function = rows_are_pixels(x, sizes.pixels) ? forward_channels_last<kActivation, kResidual, T>
                                                             : forward_contiguous<kActivation, kResidual, T>;
      function(sizes, x.const_data_ptr<T>(), kResidual ? added.const_data_ptr<T>() : nullptr,
               kResidual ? total.mutable_data_ptr<T>() : nullptr, y.mutable_data_ptr<T>(), parameters.affine, eps, shift,
               mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>());
    };
    with_activation(activation_of(activation), [&](auto kind) {
      if (residual) run(kind, std::true_type());
      else run(kind, std::false_type());
    });
  };
  if (x.scalar_type() == at::kFloat) serve(float());
  else serve(c10::BFloat16());
  return {y, total, mean, rstd};
}

// The row stride of a slice of the channels of a channels-last tensor.
int64_t row_of(const Tensor& out) {
  const int64_t row = out.stride(3), height = out.size(2), width = out.size(3);
  TORCH_CHECK((out.size(1) == 1 || out.stride(1) == 1) && row >= out.size(1) && (height == 1 || out.stride(2) == width * row) &&
                  (out.size(0) == 1 || out.stride(0) == height * width * row),
              "out must be a slice of the channels of a channels-last tensor");
  return row;
}

void group_norm_act_into(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t num_groups, double eps,
                         const std::optional<Tensor>& shift, std::string_view activation, const Tensor& out) {
  check_types(x, {&weight, &bias});
  TORCH_CHECK(x.is_contiguous(at::MemoryFormat::ChannelsLast), "x must be channels-last");
  TORCH_CHECK(out.sizes() == x.sizes() && out.scalar_type() == x.scalar_type(), "out must be like x");
  const Sizes sizes{x.size(0), x.size(1), x.size(2) * x.size(3), num_groups, row_of(out)};
  TORCH_CHECK(num_groups > 0 && sizes.channels % num_groups == 0, "channels must divide into groups");
  check_shift(shift, sizes);
  const Tensor statistics = at::empty({2, sizes.samples, num_groups}, at::kFloat);
  float* mean = statistics.mutable_data_ptr<float>();
  const AffineBuffer parameters(weight, bias, sizes.channels);
  const auto serve = [&](auto element) {
    using T = decltype(element);
    with_activation(activation_of(activation), [&](auto kind) {
      forward_channels_last<decltype(kind)::value, false, T>(sizes, x.const_data_ptr<T>(), nullptr, nullptr,
                                                             out.mutable_data_ptr<T>(), parameters.affine, eps, shift, mean,
                                                             mean + sizes.samples * num_groups);
    });
  };
  if (x.scalar_type() == at::kFloat) serve(float());
  else serve(c10::BFloat16());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_act_backward(const Tensor& grad, const Tensor& given,
                                                                   const Tensor& weight, const Tensor& bias,
                                                                   const Tensor& mean, const Tensor& rstd,
                                                                   const std::optional<Tensor>& shift,
                                                                   std::string_view activation) {
  check_types(given, {&weight, &bias});
  const auto format = format_of(given);
  const Tensor x = given.contiguous(format);
  const Tensor dy = grad.to(x.scalar_type()).contiguous(format);
  const Sizes sizes{x.size(0), x.size(1), x.size(2) * x.size(3), mean.size(1)};
  check_shift(shift, sizes);
  const Tensor means = mean.contiguous(), deviations = rstd.contiguous();
  Tensor grad_x = at::empty_like(x, x.options(), format);
  const Tensor sums = at::empty({sizes.samples, 2, sizes.channels}, at::kFloat);
  Tensor shift_gradient = at::empty({shift ? sizes.samples : 0, sizes.channels}, at::kFloat);
  const AffineBuffer parameters(weight, bias, sizes.channels);
  const auto serve = [&](auto element) {
    using T = decltype(element);
    with_activation(activation_of(activation), [&](auto kind) {
      constexpr int kActivation = decltype(kind)::value;
      const auto function =
          rows_are_pixels(x, sizes.pixels) ? backward_channels_last<kActivation, T> : backward_contiguous<kActivation, T>;
      function(sizes, dy.const_data_ptr<T>(), x.const_data_ptr<T>(), grad_x.mutable_data_ptr<T>(), parameters.affine,
               means.const_data_ptr<float>(), deviations.const_data_ptr<float>(), shift, sums.mutable_data_ptr<float>(),
               shift ? shift_gradient.mutable_data_ptr<float>() : nullptr);
    });
  };
  if (x.scalar_type() == at::kFloat) serve(float());
  else serve(c10::BFloat16());
  const Tensor over_samples = sums.sum(0);
  shift_gradient = shift ? shift_gradient.to(shift->scalar_type()) : at::empty({0}, x.options());
  return {grad_x, over_samples[1].to(weight.scalar_type(), false, true), over_samples[0].to(bias.scalar_type(), false, true),
          shift_gradient};
}

TORCH_LIBRARY_FRAGMENT(multibeta, m) {
  m.def(
      "group_norm_act_cpp(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? shift, Tensor? residual, "
      "str activation) -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_act_into_cpp(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? shift, str activation, "
      "Tensor(a!) out) -> ()");
  m.def(
      "group_norm_act_backward_cpp(Tensor grad, Tensor total, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
      "Tensor? shift, str activation) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_shift)");
}

TORCH_LIBRARY_IMPL(multibeta, CPU, m) {
  m.impl("group_norm_act_cpp", group_norm_act);
  m.impl("group_norm_act_into_cpp", group_norm_act_into);
  m.impl("group_norm_act_backward_cpp", group_norm_act_backward);
}

}  // namespace
}  // namespace multibeta
