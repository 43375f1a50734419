// The sampler's update with noise that belongs to the sample: Philox4x32-10 and Box-Muller, vectorised, float32 arithmetic.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/result_type.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace multibeta {
namespace {

using at::Tensor;

// The columns of a row of the sampler, and of what stands between network and sampler: the fields of kernels/columns.py.
enum SamplerRow {
  kLatent, kNoisePrediction, kDelta, kFreshNoise, kPreviousNoisePrediction, kPreviousDelta, kOffset, kSamplerColumns
};
enum TwoHeadRow {
  kNoiseFromOutput, kNoiseFromLatent, kNoiseOffset, kDeltaFromSecond, kInputFromLatent, kInputOffset,
  kDeltaFromNoise, kDeltaFromLatent, kDeltaOffset, kTwoHeadColumns
};
enum OneHeadRow {  // whose other columns are those of two heads
  kDeltaFromCondition = kDeltaFromSecond,
  kDeltaLimit = kDeltaOffset, kInputFromCondition, kOneHeadColumns
};

constexpr int64_t kBatch = 16;              // Philox blocks at a time
constexpr int64_t kPiece = 4096;            // positions of a sample per task, a multiple of 4 kBatch

// Words of kBatch Philox4x32-10 blocks with counters (quad + lane, step, stream, 0).
inline void philox(uint64_t key, uint32_t quad, uint32_t step, uint32_t stream, uint32_t (&words)[4][kBatch]) {
  uint32_t(&c0)[kBatch] = words[0], (&c1)[kBatch] = words[1], (&c2)[kBatch] = words[2], (&c3)[kBatch] = words[3];
  for (int64_t i = 0; i < kBatch; ++i) c0[i] = quad + static_cast<uint32_t>(i), c1[i] = step, c2[i] = stream, c3[i] = 0;
  uint32_t low_key = static_cast<uint32_t>(key), high_key = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int64_t i = 0; i < kBatch; ++i) {
      const uint64_t first = uint64_t{0xD2511F53} * c0[i], second = uint64_t{0xCD9E8D57} * c2[i];
      c0[i] = static_cast<uint32_t>(second >> 32) ^ c1[i] ^ low_key;
      c2[i] = static_cast<uint32_t>(first >> 32) ^ c3[i] ^ high_key;
      c1[i] = static_cast<uint32_t>(second);
      c3[i] = static_cast<uint32_t>(first);
    }
    low_key += 0x9E3779B9u, high_key += 0xBB67AE85u;
  }
}

// Normals at the positions [begin, begin + count) of one sample; begin is a multiple of 4.
void fill_normals(uint64_t seed, uint32_t step, uint32_t stream, int64_t begin, int64_t count, float* out) {
  uint32_t words[4][kBatch];
  float uniform[4][kBatch], normal[4][kBatch];
  for (int64_t done = 0; done < count; done += 4 * kBatch) {
    philox(seed, static_cast<uint32_t>((begin + done) / 4), step, stream, words);
    for (int w = 0; w < 4; ++w)
      for (int64_t i = 0; i < kBatch; ++i) uniform[w][i] = static_cast<float>(static_cast<int32_t>(words[w][i] >> 8));
    for (int pair = 0; pair < 4; pair += 2) {
      for (int64_t i = 0; i < kBatch; i += kLanes) {
        const Vec first = (load(uniform[pair] + i) + Vec(1.f)) * Vec(0x1p-24f);  // in (0, 1]: the logarithm is finite
        const Vec radius = (Vec(-2.f) * first.log()).sqrt();
        const Vec angle = load(uniform[pair + 1] + i) * Vec(static_cast<float>(2 * 3.14159265358979323846 * 0x1p-24));
        store(normal[pair] + i, radius * angle.cos());
        store(normal[pair + 1] + i, radius * angle.sin());
      }
    }
    const int64_t some = std::min(count - done, 4 * kBatch);
    if (some == 4 * kBatch) {
      for (int64_t i = 0; i < kBatch; ++i)
        for (int w = 0; w < 4; ++w) out[done + 4 * i + w] = normal[w][i];
    } else {
      for (int64_t j = 0; j < some; ++j) out[done + j] = normal[j % 4][j / 4];
    }
  }
}

// Whether any of `count` rows takes fresh noise.
bool any_fresh(const float* rows, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (rows[kSamplerColumns * i + kFreshNoise] != 0) return true;
  return false;
}

// Runs piece(n, begin, end) for all positions of all samples; pieces begin at multiples of four.
template <typename F>
void over_pieces(int64_t samples, int64_t size, const F& piece) {
  const int64_t pieces = (size + kPiece - 1) / kPiece;
  at::parallel_for(0, samples * pieces, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % pieces * kPiece;
      piece(i / pieces, begin, std::min(size, begin + kPiece));
    }
  });
}

Tensor check_seeds(const Tensor& seeds, int64_t samples) {
  TORCH_CHECK(seeds.scalar_type() == at::kLong && seeds.dim() == 1 && seeds.size(0) == samples, "seeds must be (N,) int64");
  return seeds.contiguous();
}

Tensor standard_normal(const Tensor& given, int64_t step, int64_t size, int64_t stream) {
  const Tensor seeds = check_seeds(given, given.size(0));
  Tensor out = at::empty({seeds.size(0), size}, seeds.options().dtype(at::kFloat));
  const int64_t* keys = seeds.const_data_ptr<int64_t>();
  float* data = out.mutable_data_ptr<float>();
  over_pieces(seeds.size(0), size, [&](int64_t n, int64_t begin, int64_t end) {
    fill_normals(keys[n], static_cast<uint32_t>(step), static_cast<uint32_t>(stream), begin, end - begin, data + n * size + begin);
  });
  return out;
}

Tensor as_float(const Tensor& t) { return t.to(at::kFloat).contiguous(); }

Tensor sampler_update(const Tensor& latent, const Tensor& noise_prediction, const Tensor& delta, const Tensor& row,
                      const Tensor& given_seeds, int64_t step, const std::optional<Tensor>& previous_noise,
                      const std::optional<Tensor>& previous_delta) {
  const Tensor seeds = check_seeds(given_seeds, latent.size(0));
  const bool per_channel = row.dim() == 2;
  TORCH_CHECK(per_channel ? latent.dim() > 1 && row.size(0) == latent.size(1) && row.size(1) == kSamplerColumns
                          : row.numel() == kSamplerColumns,
              "row must be (7,) or (C, 7)");
  TORCH_CHECK(noise_prediction.sizes() == latent.sizes() && delta.sizes() == latent.sizes(), "predictions must be like latent");
  TORCH_CHECK(previous_noise.has_value() == previous_delta.has_value(), "previous predictions come in a pair");
  auto dtype = c10::promoteTypes(c10::promoteTypes(latent.scalar_type(), noise_prediction.scalar_type()), delta.scalar_type());
  if (previous_noise) {
    TORCH_CHECK(previous_noise->sizes() == latent.sizes() && previous_delta->sizes() == latent.sizes(),
                "previous predictions must be like latent");
    dtype = c10::promoteTypes(dtype, c10::promoteTypes(previous_noise->scalar_type(), previous_delta->scalar_type()));
  }
  const Tensor row_doubles = row.to(at::kDouble).contiguous();
  const double* coefficients = row_doubles.const_data_ptr<double>();
  const std::vector<float> weights(coefficients, coefficients + row_doubles.numel());
  const bool draws = any_fresh(weights.data(), weights.size() / kSamplerColumns);
  const Tensor tensors[3] = {as_float(latent), as_float(noise_prediction), as_float(delta)};
  Tensor old[2];
  if (previous_noise) old[0] = as_float(*previous_noise), old[1] = as_float(*previous_delta);
  Tensor result = at::empty(latent.sizes(), latent.options().dtype(at::kFloat));
  const int64_t samples = latent.size(0), size = latent.numel() / std::max<int64_t>(samples, 1);
  const int64_t span = per_channel ? size / row.size(0) : size;  // positions of a sample with the same row
  const int64_t* keys = seeds.const_data_ptr<int64_t>();
  const float *x = tensors[0].const_data_ptr<float>(), *noise = tensors[1].const_data_ptr<float>(),
              *drift = tensors[2].const_data_ptr<float>();
  const float* old_noise = previous_noise ? old[0].const_data_ptr<float>() : nullptr;
  const float* old_drift = previous_noise ? old[1].const_data_ptr<float>() : nullptr;
  float* out = result.mutable_data_ptr<float>();
  over_pieces(samples, size, [&](int64_t n, int64_t begin, int64_t end) {
    float fresh[kPiece];
    if (draws) fill_normals(keys[n], static_cast<uint32_t>(step), 0, begin, end - begin, fresh);
    for (int64_t p = begin, next; p < end; p = next) {
      next = std::min(end, (p / span + 1) * span);
      const int64_t at = n * size + p, count = next - p;
      const float* drawn = fresh + (p - begin);
      float weight[kSamplerColumns];  // a copy, which no store to out can change
      std::copy_n(weights.data() + kSamplerColumns * (p / span), kSamplerColumns, weight);
      for (int64_t i = 0; i < count; ++i)
        out[at + i] = weight[kLatent] * x[at + i] + weight[kNoisePrediction] * noise[at + i] + weight[kDelta] * drift[at + i] +
                      weight[kOffset];
      if (draws)
        for (int64_t i = 0; i < count; ++i) out[at + i] += weight[kFreshNoise] * drawn[i];
      if (old_noise)
        for (int64_t i = 0; i < count; ++i)
          out[at + i] += weight[kPreviousNoisePrediction] * old_noise[at + i] + weight[kPreviousDelta] * old_drift[at + i];
    }
  });
  if (dtype == at::kFloat && latent.is_contiguous()) return result;
  Tensor shaped = at::empty_like(latent, latent.options().dtype(dtype));  // the strides of latent
  return shaped.copy_(result);
}

// `count` values of one channel from `position` on, in a tensor of any strides and float32 or bfloat16.
struct Plane {
  float* wide = nullptr;
  c10::BFloat16* narrow = nullptr;
  int64_t sample, channel, row, column, width;

  explicit Plane(const Tensor& t)
      : sample(t.stride(0)), channel(t.stride(1)), row(t.stride(2)), column(t.stride(3)), width(t.size(3)) {
    if (t.scalar_type() == at::kFloat) wide = t.mutable_data_ptr<float>();
    else narrow = t.mutable_data_ptr<c10::BFloat16>();
  }

  template <typename F>
  void each(int64_t n, int64_t c, int64_t position, int64_t count, const F& f) const {  // f(index, offset in memory)
    const int64_t base = n * sample + c * channel;
    if (row == width * column) {
      for (int64_t i = 0; i < count; ++i) f(i, base + (position + i) * column);
    } else {
      for (int64_t i = 0; i < count; ++i) f(i, base + (position + i) / width * row + (position + i) % width * column);
    }
  }
  void read(int64_t n, int64_t c, int64_t position, int64_t count, float* out) const {
    if (wide) each(n, c, position, count, [&](int64_t i, int64_t at) { out[i] = wide[at]; });
    else each(n, c, position, count, [&](int64_t i, int64_t at) { out[i] = static_cast<float>(narrow[at]); });
  }
  void write(int64_t n, int64_t c, int64_t position, int64_t count, const float* values) const {
    if (wide) each(n, c, position, count, [&](int64_t i, int64_t at) { wide[at] = values[i]; });
    else each(n, c, position, count, [&](int64_t i, int64_t at) { narrow[at] = static_cast<c10::BFloat16>(values[i]); });
  }
};

void check_plane(const Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 4 && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16), name,
              " must be (N, C, H, W), float32 or bfloat16");
}

void sampler_step(const Tensor& latent, const Tensor& network_input, const Tensor& history, const Tensor& output,
                  const Tensor& rows, const Tensor& channel_rows, const Tensor& steps, const Tensor& counter,
                  const Tensor& given_seeds, const std::optional<Tensor>& condition) {
  check_plane(latent, "latent"), check_plane(network_input, "network_input"), check_plane(output, "output");
  const int64_t samples = latent.size(0), channels = latent.size(1), pixels = latent.size(2) * latent.size(3);
  const int64_t size = channels * pixels, index = counter.const_data_ptr<int64_t>()[0];
  TORCH_CHECK(latent.is_contiguous() && history.is_contiguous() && history.numel() == 2 * latent.numel() &&
                  latent.scalar_type() == at::kFloat && history.scalar_type() == at::kFloat,
              "latent and history must be contiguous float32");
  const int64_t heads = condition ? 1 : 2;  // of the network
  const int64_t width = condition ? int64_t{kOneHeadColumns} : int64_t{kTwoHeadColumns};  // of a row of channel_rows
  TORCH_CHECK(network_input.sizes() == latent.sizes() && output.size(0) == samples && output.size(1) == heads * channels &&
                  output.size(2) * output.size(3) == pixels,
              "network_input must be like latent, output (N, ", heads, " C, H, W)");
  TORCH_CHECK(!condition || (condition->sizes() == latent.sizes() && condition->is_contiguous() &&
                             condition->scalar_type() == at::kFloat),
              "condition must be like latent");
  const bool per_channel = rows.dim() == 3;
  TORCH_CHECK(rows.scalar_type() == at::kFloat && rows.is_contiguous() && (per_channel || rows.dim() == 2) &&
                  (!per_channel || rows.size(1) == channels) && rows.size(-1) == kSamplerColumns &&
                  channel_rows.scalar_type() == at::kFloat && channel_rows.is_contiguous() && channel_rows.dim() == 3 &&
                  channel_rows.size(1) == channels && channel_rows.size(2) == width && steps.scalar_type() == at::kLong &&
                  steps.is_contiguous(),
              "rows must be (S, 7) or (S, C, 7), channel_rows (S, C, ", width, "), steps (S,), contiguous");
  TORCH_CHECK_INDEX(index >= 0 && index < rows.size(0) && index < channel_rows.size(0) && index < steps.size(0),
                    "counter must lie in the rows, got ", index);
  const Tensor seeds = check_seeds(given_seeds, samples);
  const int64_t* keys = seeds.const_data_ptr<int64_t>();
  const int64_t row_stride = per_channel ? kSamplerColumns : 0, row_count = per_channel ? channels : 1;
  const float* own_rows = rows.const_data_ptr<float>() + kSamplerColumns * row_count * index;
  const float* columns = channel_rows.const_data_ptr<float>() + width * channels * index;
  const bool draws = any_fresh(own_rows, row_count);
  const uint32_t step = static_cast<uint32_t>(steps.const_data_ptr<int64_t>()[index]);
  float *x = latent.mutable_data_ptr<float>(), *old_noise = history.mutable_data_ptr<float>(), *old_delta = old_noise + samples * size;
  const float* conditions = condition ? condition->const_data_ptr<float>() : nullptr;
  const Plane predictions(output), input(network_input);
  const auto walk = [&](auto one_head) {
    over_pieces(samples, size, [&](int64_t n, int64_t begin, int64_t end) {
      float fresh[kPiece], first[kPiece], second[kPiece];  // with one head, second is the condition
      if (draws) fill_normals(keys[n], step, 0, begin, end - begin, fresh);
      else std::fill_n(fresh, end - begin, 0.f);
      for (int64_t p = begin, next; p < end; p = next) {  // the part of each channel in this piece
        const int64_t c = p / pixels, position = p % pixels, at = n * size + p;
        next = std::min(end, (c + 1) * pixels);
        const int64_t count = next - p;
        const float *row = own_rows + row_stride * c, *own = columns + width * c, *noise = fresh + (p - begin);
        predictions.read(n, c, position, count, first);
        if constexpr (one_head) std::copy_n(conditions + at, count, second);
        else predictions.read(n, channels + c, position, count, second);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          const float noise_prediction = own[kNoiseFromOutput] * first[i] + own[kNoiseFromLatent] * x[at + i] + own[kNoiseOffset];
          float delta;
          if constexpr (one_head) {
            const float centre = own[kDeltaFromCondition] * second[i], limit = own[kDeltaLimit];
            const float whole = own[kDeltaFromNoise] * noise_prediction + own[kDeltaFromLatent] * x[at + i] + centre;
            delta = (whole < -limit ? -limit : whole > limit ? limit : whole) - centre;  // what is not a number stays so
          } else {
            delta = own[kDeltaFromSecond] * second[i] + own[kDeltaFromNoise] * noise_prediction;
            delta += own[kDeltaFromLatent] * x[at + i] + own[kDeltaOffset];
          }
          const float result = row[kLatent] * x[at + i] + row[kNoisePrediction] * noise_prediction + row[kDelta] * delta +
                               row[kFreshNoise] * noise[i] + row[kOffset] +
                               (row[kPreviousNoisePrediction] * old_noise[at + i] + row[kPreviousDelta] * old_delta[at + i]);
          old_noise[at + i] = noise_prediction;
          old_delta[at + i] = delta;
          x[at + i] = result;
          first[i] = own[kInputFromLatent] * result + own[kInputOffset];
          if constexpr (one_head) first[i] += own[kInputFromCondition] * second[i];
        }
        input.write(n, c, position, count, first);
      }
    });
  };
  if (condition) walk(std::true_type{});
  else walk(std::false_type{});
}

TORCH_LIBRARY_FRAGMENT(multibeta, m) {
  m.def("standard_normal_cpp(Tensor seeds, int step, int size, int stream) -> Tensor");
  m.def(
      "sampler_update_cpp(Tensor latent, Tensor noise_prediction, Tensor delta, Tensor row, Tensor seeds, int step, "
      "Tensor? previous_noise, Tensor? previous_delta) -> Tensor");
  m.def(
      "sampler_step_cpp(Tensor(a!) latent, Tensor(b!) network_input, Tensor(c!) history, Tensor output, Tensor rows, "
      "Tensor channel_rows, Tensor steps, Tensor counter, Tensor seeds, Tensor? condition=None) -> ()");
}

TORCH_LIBRARY_IMPL(multibeta, CPU, m) {
  m.impl("standard_normal_cpp", standard_normal);
  m.impl("sampler_update_cpp", sampler_update);
  m.impl("sampler_step_cpp", sampler_step);
}

}  // namespace
}  // namespace multibeta
