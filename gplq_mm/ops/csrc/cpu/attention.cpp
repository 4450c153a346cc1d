// The attention op on the CPU. What it computes stands in gplq_mm/ops/reference.py; the checks
// are those of gplq_mm/ops/attention_checks.py, with the same words.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "kernel_set.h"
#include "parallel.h"

namespace gplq_mm {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum Operand { kQuery, kKey, kValue, kProbs, kOperands };
// Scores that are worth a thread of their own.
constexpr int64_t kGrainScores = 1 << 14;
// 255 * 128 * 2^16 < 2^31: sums of so many products of codes are exact in int32.
constexpr int64_t kLongestSum = 1 << 16;
// From this many tasks a thread on, none waits long for another.
constexpr int64_t kEnoughTasks = 16;

// Numbers below `out_rows` may occur once: two tokens cannot be written to the same row. Returns
// whether each of them occurs.
bool check_rows(const Tensor& rows, int64_t count, int64_t out_rows) {
  std::vector<bool> written(static_cast<size_t>(out_rows));
  int64_t distinct = 0;
  const auto* row = rows.const_data_ptr<int32_t>();
  for (int64_t i = 0, n = rows.numel(); i < n; ++i) {
    TORCH_CHECK_VALUE(0 <= row[i] && row[i] < count, "rows must lie in 0..", count - 1,
                      ", got ", row[i], ".");
    if (row[i] >= out_rows) continue;
    TORCH_CHECK_VALUE(!written[row[i]], "rows must name an output row once, ", row[i],
                      " occurs again.");
    written[row[i]] = true;
    ++distinct;
  }
  return distinct == out_rows;
}

struct Shape {
  int64_t windows, tokens, channels;
};

Shape check_attention(const Tensor& qkv, int64_t heads, const Tensor& grids,
                      at::IntArrayRef limits, at::TensorList tables, const OptionalTensor& bias,
                      const OptionalTensor& mask, const OptionalTensor& rows, int64_t out_rows) {
  check_float(qkv);
  TORCH_CHECK_VALUE(heads >= 1, "heads must be at least 1, got ", heads, ".");
  Shape shape = {};
  if (rows) {
    TORCH_CHECK_VALUE(qkv.dim() == 2, "with rows, qkv must be (R, 3 * channels), got shape ",
                      qkv.sizes(), ".");
    TORCH_CHECK_VALUE(rows->dim() == 2, "rows must be (windows, tokens), got shape ",
                      rows->sizes(), ".");
    check_tensor("rows", *rows, {at::kInt}, rows->sizes());
    TORCH_CHECK_VALUE(0 <= out_rows && out_rows <= qkv.size(0), "out_rows must lie in 0..",
                      qkv.size(0), ", got ", out_rows, ".");
    shape.windows = rows->size(0);
    shape.tokens = rows->size(1);
  } else {
    TORCH_CHECK_VALUE(qkv.dim() == 3, "qkv must be (batch, tokens, 3 * channels), got shape ",
                      qkv.sizes(), ".");
    shape.windows = qkv.size(0);
    shape.tokens = qkv.size(1);
  }
  const int64_t columns = qkv.size(-1);
  TORCH_CHECK_VALUE(columns > 0 && columns % 3 == 0 && columns / 3 % heads == 0, "qkv has ",
                    columns, " columns, they cannot be q, k and v of ", heads, " heads.");
  shape.channels = columns / 3;
  check_tensor("grids", grids, {at::kFloat}, {kOperands, 2, heads});
  TORCH_CHECK_VALUE(limits.size() == 2 * kOperands,
                    "limits must be the smallest and largest code of q, k, v and probabilities, "
                    "got ",
                    limits.size(), " integers.");
  for (int64_t i = 0; i < kOperands; ++i) check_codes(limits.slice(2 * i, 2));
  TORCH_CHECK_VALUE(tables.size() == kOperands,
                    "tables must be those of q, k, v and probabilities, got ", tables.size(),
                    " tensors.");
  for (int64_t i = 0; i < kOperands; ++i) {
    const std::string name = "tables[" + std::to_string(i) + "]";
    check_table(name.c_str(), tables[i], {heads, kPositions}, limits.slice(2 * i, 2));
  }
  if (bias) check_tensor("bias", *bias, {at::kFloat}, {heads, shape.tokens, shape.tokens});
  if (mask) {
    TORCH_CHECK_VALUE(mask->dim() == 3 && mask->size(0) > 0 && shape.windows % mask->size(0) == 0,
                      "mask must be (M, tokens, tokens) with M a divisor of the ", shape.windows,
                      " windows, got shape ", mask->sizes(), ".");
    check_tensor("mask", *mask, {at::kFloat}, {mask->size(0), shape.tokens, shape.tokens});
  }
  const int64_t longest = std::max(shape.tokens, shape.channels / heads);
  TORCH_CHECK_VALUE(longest <= kLongestSum, "sums over ", longest,
                    " codes can exceed int32; at most ", kLongestSum,
                    " tokens or channels of a head are supported.");
  return shape;
}

// What is subtracted from codes so that they start at 0; or so that 0 is in their middle: then
// they fit a signed byte, and sums and what is to be subtracted from them stay small.
int32_t base_of(int64_t low, int64_t high, bool is_signed) {
  const auto middle = std::floor(static_cast<double>(low + high + 1) / 2);
  return static_cast<int32_t>(is_signed ? middle : static_cast<double>(low));
}

class Constants {
 public:
  Constants(const Tensor& grids, at::IntArrayRef limits, at::TensorList tables, int64_t heads,
            int64_t tokens, int64_t head_dim, double scale, bool added) {
    const Tensor own = grids.contiguous();
    const float* values = own.const_data_ptr<float>();
    for (int64_t i = 0; i < kOperands; ++i) {
      for (int64_t head = 0; head < heads; ++head) {
        const float step = values[2 * i * heads + head];
        TORCH_CHECK_VALUE(step > 0 && std::isfinite(step),
                          "grids must hold positive finite scales, got ", step, ".");
      }
      const bool is_signed = i == kKey || i == kValue;
      const int64_t low = limits[2 * i], high = limits[2 * i + 1];
      low_[i] = static_cast<float>(low);
      high_[i] = static_cast<float>(high);
      base_[i] = base_of(low, high, is_signed);
      largest_[i] = static_cast<int32_t>(
          std::max(std::abs(low - base_[i]), std::abs(high - base_[i])));
      if (tables[i].numel() > 0) take_table(i, tables[i].contiguous());
    }
    // exp(x) is computed as exp2(x * log2 e). Where nothing is added to the scores, the product
    // joins their factors.
    const double unit = added ? scale : scale * 1.4426950408889634074;
    heads_.reserve(static_cast<size_t>(heads));
    for (int64_t head = 0; head < heads; ++head) {
      OperandGrid grid[kOperands];
      double step[kOperands], offset[kOperands];
      for (int64_t i = 0; i < kOperands; ++i) {
        const float s = values[2 * i * heads + head], o = values[(2 * i + 1) * heads + head];
        const float inverse = 1.0f / s;
        const bool has_levels = !levels_[i].empty();
        const uint8_t* table = has_levels ? levels_[i].data() + head * kPositions : nullptr;
        grid[i] = {inverse, o * -inverse, low_[i], high_[i], has_levels ? 0 : base_[i], table};
        step[i] = s;
        offset[i] = static_cast<double>(o) + static_cast<double>(s) * base_[i];
      }
      const auto n = static_cast<double>(tokens), d = static_cast<double>(head_dim);
      heads_.push_back({grid[kQuery], grid[kKey], grid[kValue], grid[kProbs],
                        static_cast<float>(unit * step[kQuery] * step[kKey]),
                        static_cast<float>(unit * offset[kQuery] * step[kKey]),
                        static_cast<float>(unit * step[kQuery] * offset[kKey]),
                        static_cast<float>(unit * d * offset[kQuery] * offset[kKey]),
                        static_cast<float>(step[kProbs] * step[kValue]),
                        static_cast<float>(step[kProbs] * offset[kValue]),
                        static_cast<float>(offset[kProbs] * step[kValue]),
                        static_cast<float>(n * offset[kProbs] * offset[kValue])});
    }
  }

  const HeadConstants* data() const { return heads_.data(); }
  // Magnitude of what is multiplied.
  int32_t largest(Operand i) const { return largest_[i]; }

 private:
  // Levels minus the base, as bytes with or without a sign.
  void take_table(int64_t i, const Tensor& table) {
    const auto* levels = table.const_data_ptr<uint8_t>();
    largest_[i] = 0;
    for (int64_t k = 0; k < table.numel(); ++k) {
      const int32_t level = levels[k] - base_[i];
      largest_[i] = std::max(largest_[i], std::abs(level));
      levels_[i].push_back(static_cast<uint8_t>(level));
    }
  }

  float low_[kOperands], high_[kOperands];
  int32_t base_[kOperands], largest_[kOperands];
  std::vector<uint8_t> levels_[kOperands];  // (heads, kPositions), or none
  std::vector<HeadConstants> heads_;
};

// Parts of the queries of one head, so that the tasks are a multiple of the threads. A thread
// does the parts of a head one after the other and prepares k and v once.
int64_t parts_of(int64_t pairs, int64_t blocks) {
  const int64_t threads = at::get_num_threads();
  if (pairs >= kEnoughTasks * threads) return 1;
  return std::min(blocks, threads / std::gcd(pairs, threads));
}

Tensor int4_attention(const Tensor& qkv, int64_t heads, double scale, const Tensor& grids,
                      at::IntArrayRef limits, at::TensorList tables, bool row_relative,
                      const OptionalTensor& bias, const OptionalTensor& mask,
                      const OptionalTensor& rows, int64_t out_rows) {
  const Shape shape =
      check_attention(qkv, heads, grids, limits, tables, bias, mask, rows, out_rows);
  const int64_t windows = shape.windows, tokens = shape.tokens, channels = shape.channels;
  const bool added = bias || mask;
  const Constants constants(grids, limits, tables, heads, tokens, channels / heads, scale, added);

  Tensor row_index, bias_real, mask_real, out;
  if (rows) {
    row_index = rows->contiguous();
    // Output rows that no token names are zero.
    out = check_rows(row_index, qkv.size(0), out_rows)
              ? at::empty({out_rows, channels}, at::kFloat)
              : at::zeros({out_rows, channels}, at::kFloat);
  } else {
    out = at::empty({windows, tokens, channels}, at::kFloat);
  }
  if (windows * tokens == 0 || out.numel() == 0) return out.to(qkv.scalar_type());
  const Tensor input = qkv.to(at::kFloat).contiguous();
  if (bias) bias_real = bias->contiguous();
  if (mask) mask_real = mask->contiguous();

  AttentionProblem problem = {};
  problem.qkv = input.const_data_ptr<float>();
  problem.out = out.mutable_data_ptr<float>();
  if (rows) problem.rows = row_index.const_data_ptr<int32_t>();
  problem.out_rows = out_rows;
  if (bias) problem.bias = bias_real.const_data_ptr<float>();
  if (mask) {
    problem.mask = mask_real.const_data_ptr<float>();
    problem.mask_windows = mask->size(0);
  }
  problem.windows = windows;
  problem.tokens = tokens;
  problem.heads = heads;
  problem.head_dim = channels / heads;
  problem.constants = constants.data();
  problem.row_relative = row_relative;
  problem.fused = torch_fuses();
  problem.max_query = constants.largest(kQuery);
  problem.max_key = constants.largest(kKey);
  problem.max_probs = constants.largest(kProbs);
  problem.max_value = constants.largest(kValue);

  const AttentionKernel& kernel = *kernel_set().attention;
  const int64_t pairs = windows * heads;
  problem.parts = parts_of(pairs, (tokens + kernel.row_block - 1) / kernel.row_block);
  const int64_t scores = std::max<int64_t>(1, tokens * tokens / problem.parts);
  const int64_t grain = std::max<int64_t>(1, kGrainScores / scores);
  const auto bytes = static_cast<size_t>(kernel.scratch(problem));
  parallel_for(0, pairs * problem.parts, grain, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(bytes);
    kernel.run(problem, begin, end, scratch.get());
  });
  return out.to(qkv.scalar_type());
}

}  // namespace
}  // namespace gplq_mm

TORCH_LIBRARY_IMPL(gplq_mm, CPU, m) {
  m.impl("int4_attention", &gplq_mm::int4_attention);
}
