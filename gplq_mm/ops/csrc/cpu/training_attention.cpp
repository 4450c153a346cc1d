// Attention of training on the CPU. What it computes stands in gplq_mm/ops/training_attention.py;
// here every pair of an item and a head is one task, whose scores stay in the cache.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "learned_grid.h"
#include "parallel.h"
#include "product.h"

namespace gplq_mm {
namespace {

using at::Tensor;

// What is added to scores of shape (batch, heads, queries, keys), row by row.
class Rows {
 public:
  Rows(at::IntArrayRef sizes, double factor, const OptionalTensor& bias,
       const OptionalTensor& mask)
      : factor_(static_cast<float>(factor)),
        heads_(sizes[1]),
        queries_(sizes[2]),
        keys_(sizes[3]) {
    if (bias.has_value()) {
      check_tensor("bias", *bias, {at::kFloat}, {heads_, queries_, keys_});
      bias_ = bias->contiguous();
    }
    if (mask.has_value()) {
      windows_ = mask->size(0);
      check_tensor("mask", *mask, {at::kFloat}, {windows_, queries_, keys_});
      TORCH_CHECK_VALUE(windows_ > 0 && sizes[0] % windows_ == 0, "the batch of ",
                        sizes[0], " must be a multiple of the ", windows_, " masks.");
      mask_ = mask->contiguous();
    }
  }

  int64_t columns() const { return keys_; }
  int64_t space() const { return round_up(keys_, 64); }

  // Row of that number over the whole batch, whose scores are `scores`.
  SoftmaxRow row(int64_t row, float* scores) const {
    SoftmaxRow result = {};
    result.scores = scores;
    result.factor = factor_;
    result.columns = keys_;
    const int64_t plane = row % (heads_ * queries_), query = row % queries_;
    if (bias_.defined()) result.bias = bias_.const_data_ptr<float>() + plane * keys_;
    if (mask_.defined()) {
      const int64_t window = row / (heads_ * queries_) % windows_;
      result.mask = mask_.const_data_ptr<float>() + (window * queries_ + query) * keys_;
    }
    return result;
  }

 private:
  Tensor bias_, mask_;
  float factor_;
  int64_t heads_, queries_, keys_, windows_ = 1;
};

void check_scores(const Tensor& scores) {
  TORCH_CHECK_VALUE(scores.dim() == 4, "scores must have 4 axes, got ", scores.dim(), ".");
  check_tensor("scores", scores, {at::kFloat}, scores.sizes());
  TORCH_CHECK_VALUE(scores.is_contiguous(), "scores must be contiguous.");
}

void check_rows(const GridOf& scales) {
  TORCH_CHECK_VALUE(!scales.per_column() || scales.channels() == 1,
                    "scores have no scale a column.");
}

Tensor softmax_fake_quant_(Tensor& scores, double factor, const OptionalTensor& bias,
                           const OptionalTensor& mask, const Tensor& scale,
                           const OptionalTensor& offset, const Tensor& table, at::IntArrayRef grid,
                           bool row_relative) {
  check_scores(scores);
  const Rows rows(scores.sizes(), factor, bias, mask);
  const GridOf scales(scores.sizes(), scale, offset, table, grid, false);
  check_rows(scales);
  Tensor total = at::empty({scores.size(0), scores.size(1), scores.size(2), 1}, at::kFloat);
  auto* totals = total.mutable_data_ptr<float>();
  auto* data = scores.mutable_data_ptr<float>();
  const int64_t columns = rows.columns();
  const TrainingKernels& kernel = *kernel_set().training;
  for_rows(total.numel(), columns * 4, [&](int64_t first, int64_t count) {
    auto* space = thread_buffer<Use::window, float>(rows.space());
    for (int64_t row = first; row < first + count; ++row) {
      totals[row] = kernel.softmax(rows.row(row, data + row * columns), *scales, row,
                                   row_relative, space);
    }
  });
  return total;
}

std::tuple<Tensor, Tensor> softmax_fake_quant_backward_(
    Tensor& grad, Tensor& scores, double factor, const OptionalTensor& bias,
    const OptionalTensor& mask, const Tensor& scale, const OptionalTensor& offset,
    const Tensor& table, at::IntArrayRef grid, bool row_relative) {
  check_scores(scores);
  const Rows rows(scores.sizes(), factor, bias, mask);
  const GridOf scales(scores.sizes(), scale, offset, table, grid, false);
  check_rows(scales);
  check_tensor("grad", grad, {at::kFloat}, scores.sizes());
  TORCH_CHECK_VALUE(grad.is_contiguous(), "grad must be contiguous.");
  auto* grads = grad.mutable_data_ptr<float>();
  auto* data = scores.mutable_data_ptr<float>();
  const int64_t columns = rows.columns();
  const int64_t count_of_rows = scores.numel() / std::max<int64_t>(columns, 1);
  std::vector<float> parts[2];
  for (auto& part : parts) part.resize(static_cast<size_t>(count_of_rows));
  const TrainingKernels& kernel = *kernel_set().training;
  for_rows(count_of_rows, columns * 4, [&](int64_t first, int64_t count) {
    auto* space = thread_buffer<Use::window, float>(rows.space());
    for (int64_t row = first; row < first + count; ++row) {
      kernel.softmax_backward(rows.row(row, data + row * columns), *scales, row, row_relative,
                              grads + row * columns, space,
                              {parts[0].data() + row, parts[1].data() + row});
    }
  });
  return sum_rows(parts, count_of_rows, *scales, scale);
}


// -- products and softmax together -----------------------------------------------------------

enum Operand { kQuery, kKey, kValue, kProbs, kOperands };
constexpr int kInputs = 3;

// What the ops are given, but for tensors of q, k and v or their states.
class Attention {
 public:
  Attention(const std::array<at::IntArrayRef, kInputs>& sizes, double factor,
            const OptionalTensor& bias, const OptionalTensor& mask, at::TensorList scales,
            const c10::List<OptionalTensor>& offsets, at::TensorList tables,
            at::IntArrayRef grids, bool row_relative)
      : factor_(factor), row_relative_(row_relative) {
    for (const auto& shape : sizes) {
      TORCH_CHECK_VALUE(shape.size() == 4, "q, k and v must have 4 axes, got ", shape.size(), ".");
    }
    batch_ = sizes[0][0];
    heads_ = sizes[0][1];
    lengths_ = {sizes[0][2], sizes[1][2], sizes[2][2]};
    widths_ = {sizes[0][3], sizes[1][3], sizes[2][3]};
    for (const auto& shape : sizes) {
      TORCH_CHECK_VALUE(shape[0] == batch_ && shape[1] == heads_,
                        "q, k and v must have the same items and heads.");
    }
    TORCH_CHECK_VALUE(lengths_[1] == lengths_[2] && widths_[0] == widths_[1],
                      "k must be as long as v and as wide as q.");
    TORCH_CHECK_VALUE(
        scales.size() == kOperands && offsets.size() == kOperands && tables.size() == kOperands &&
            grids.size() == kOperands * 3,
        "q, k, v and the probabilities need a scale, an offset, a table and a grid each.");
    score_sizes_ = {batch_, heads_, lengths_[0], lengths_[1]};
    rows_.emplace(score_sizes_, factor, bias, mask);
    for (int i = 0; i < kOperands; ++i) {
      const auto index = static_cast<size_t>(i);
      grids_[index] = {grids[3 * index], grids[3 * index + 1], grids[3 * index + 2]};
      const at::IntArrayRef shape = i == kProbs ? at::IntArrayRef(score_sizes_) : sizes[index];
      scales_[index].emplace(shape, scales[index], offsets.get(index), tables[index],
                             grids_[index], false);
    }
    check_rows(*scales_[kProbs]);
  }

  int64_t pairs() const { return batch_ * heads_; }
  int64_t batch() const { return batch_; }
  int64_t heads() const { return heads_; }
  int64_t queries() const { return lengths_[0]; }
  int64_t keys() const { return lengths_[1]; }
  int64_t length(int operand) const { return lengths_[static_cast<size_t>(operand)]; }
  int64_t width(int operand) const { return widths_[static_cast<size_t>(operand)]; }
  // Numbers of an operand that belong to one pair.
  int64_t area(int operand) const { return length(operand) * width(operand); }
  const Rows& rows() const { return *rows_; }
  const GridOf& scale(int operand) const { return *scales_[static_cast<size_t>(operand)]; }
  at::IntArrayRef grid(int operand) const { return grids_[static_cast<size_t>(operand)]; }
  double factor() const { return factor_; }
  bool row_relative() const { return row_relative_; }

 private:
  double factor_;
  bool row_relative_;
  int64_t batch_, heads_;
  std::array<int64_t, kInputs> lengths_, widths_;
  std::vector<int64_t> score_sizes_;
  std::optional<Rows> rows_;
  std::array<std::vector<int64_t>, kOperands> grids_;
  std::array<std::optional<GridOf>, kOperands> scales_;
};

// float32 with the last axis in order, so that a pair is a matrix with a distance of rows.
Tensor matrices_of(const Tensor& x) {
  const Tensor real = x.to(at::kFloat);
  return real.stride(-1) == 1 ? real : real.contiguous();
}

Tensor matrix(float* data, int64_t rows, int64_t columns) {
  return at::from_blob(data, {rows, columns}, at::kFloat);
}

// The buffers of a thread: q, k and v of a pair, their gradients or the output, and scores.
class Space {
 public:
  explicit Space(const Attention& attention) {
    int64_t total = 0;
    const auto take = [&total](int64_t count) {
      const int64_t at = total;
      total += round_up(std::max<int64_t>(count, 1), 16);
      return at;
    };
    for (int i = 0; i < kInputs; ++i) at_[static_cast<size_t>(i)] = take(attention.area(i));
    for (int i = 0; i < 2; ++i) {
      at_[static_cast<size_t>(kInputs + i)] = take(attention.queries() * attention.keys());
    }
    const int64_t widest =
        std::max({attention.area(0), attention.area(1), attention.area(2),
                  attention.queries() * attention.width(kValue)});
    for (int i = 0; i < 2; ++i) at_[static_cast<size_t>(kInputs + 2 + i)] = take(widest);
    at_[kInputs + 4] = take(attention.rows().space());
    data_ = thread_buffer<Use::window, float>(total);
  }

  float* operand(int index) const { return data_ + at_[static_cast<size_t>(index)]; }
  float* scores() const { return data_ + at_[kInputs]; }
  float* grad_scores() const { return data_ + at_[kInputs + 1]; }
  float* rows(int index) const { return data_ + at_[static_cast<size_t>(kInputs + 2 + index)]; }
  float* line() const { return data_ + at_[kInputs + 4]; }

 private:
  float* data_;
  std::array<int64_t, kInputs + 5> at_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_fake_quant(
    const Tensor& query, const Tensor& key, const Tensor& value, double factor,
    const OptionalTensor& bias, const OptionalTensor& mask, at::TensorList scales,
    const c10::List<OptionalTensor>& offsets, at::TensorList tables, at::IntArrayRef grids,
    bool row_relative) {
  for (const auto* x : {&query, &key, &value}) check_float(*x);
  const Attention attention({query.sizes(), key.sizes(), value.sizes()}, factor, bias, mask, scales,
                            offsets, tables, grids, row_relative);
  const int64_t heads = attention.heads(), queries = attention.queries(), keys = attention.keys();
  const int64_t width = attention.width(kValue);
  const std::array<Tensor, kInputs> inputs = {matrices_of(query), matrices_of(key),
                                              matrices_of(value)};
  std::array<Tensor, kInputs> states;
  for (int i = 0; i < kInputs; ++i) {
    const auto index = static_cast<size_t>(i);
    states[index] = empty_state(inputs[index].sizes(), attention.grid(i));
  }
  // In memory a token's heads lie side by side, as the layer that follows reads them.
  const Tensor out =
      at::empty({attention.batch(), queries, heads, width}, at::kFloat).transpose(1, 2);
  const Tensor total = at::empty({attention.batch(), heads, queries, 1}, at::kFloat);
  auto* outs = out.mutable_data_ptr<float>();
  auto* totals = total.mutable_data_ptr<float>();
  const TrainingKernels& kernel = *kernel_set().training;
  parallel_for(0, attention.pairs(), 1, [&](int64_t begin, int64_t end) {
    const c10::InferenceMode without_autograd;
    const Space space(attention);
    for (int64_t pair = begin; pair < end; ++pair) {
      for (int i = 0; i < kInputs; ++i) {
        const Tensor& x = inputs[static_cast<size_t>(i)];
        const float* from = x.const_data_ptr<float>() + pair / heads * x.stride(0) +
                            pair % heads * x.stride(1);
        with_state(states[static_cast<size_t>(i)], [&](const auto& of_state, auto* codes) {
          of_state.encode(from, x.stride(2), pair * attention.length(i), attention.length(i),
                          attention.width(i), *attention.scale(i), space.operand(i),
                          codes + pair * attention.area(i));
        });
      }
      Tensor scores = matrix(space.scores(), queries, keys);
      at::mm_out(scores, matrix(space.operand(kQuery), queries, attention.width(kQuery)),
                 matrix(space.operand(kKey), keys, attention.width(kKey)).t());
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t row = pair * queries + i;
        totals[row] = kernel.softmax(attention.rows().row(row, space.scores() + i * keys),
                                     *attention.scale(kProbs), row, row_relative, space.line());
      }
      Tensor product = matrix(space.rows(0), queries, width);
      at::mm_out(product, scores, matrix(space.operand(kValue), keys, width));
      float* to = outs + pair / heads * out.stride(0) + pair % heads * out.stride(1);
      for (int64_t i = 0; i < queries; ++i, to += out.stride(2)) {
        const float* from = space.rows(0) + i * width;
        const float divisor = row_relative ? 1.0f / totals[pair * queries + i] : 1.0f;
        for (int64_t k = 0; k < width; ++k) to[k] = from[k] * divisor;
      }
    }
  });
  return {out.to(query.scalar_type()), states[kQuery], states[kKey], states[kValue], total};
}

// Sums of the gradients of scale and offset of one operand: a row each, or the columns of a task.
struct OperandSums {
  OperandSums(const GridOf& scale, int64_t rows, int64_t tasks) : per_column(scale.per_column()) {
    stride = per_column ? scale.columns() : 1;
    for (auto& part : parts) {
      part.resize(static_cast<size_t>(per_column ? tasks * stride : rows));
    }
  }
  GridGradient of(int64_t task, int64_t row) {
    const auto at = static_cast<size_t>(per_column ? task * stride : row);
    return {parts[0].data() + at, parts[1].data() + at};
  }
  std::tuple<Tensor, Tensor> total(const GridOf& scale, const Tensor& like, int64_t rows,
                                   int64_t tasks) const {
    if (!per_column) return sum_rows(parts, rows, *scale, like);
    return {total_of(parts[0], tasks, stride, like), total_of(parts[1], tasks, stride, like)};
  }

  bool per_column;
  int64_t stride;
  std::vector<float> parts[2];
};

std::vector<Tensor> attention_fake_quant_backward(
    const Tensor& grad, at::TensorList states, const Tensor& total, double factor,
    const OptionalTensor& bias, const OptionalTensor& mask, at::TensorList scales,
    const c10::List<OptionalTensor>& offsets, at::TensorList tables, at::IntArrayRef grids,
    bool row_relative) {
  TORCH_CHECK_VALUE(states.size() == kInputs, "q, k and v have a state each, got ", states.size(),
                    ".");
  check_float(grad);
  const Attention attention({states[0].sizes(), states[1].sizes(), states[2].sizes()}, factor, bias,
                            mask, scales, offsets, tables, grids, row_relative);
  for (int i = 0; i < kInputs; ++i) check_state(states[static_cast<size_t>(i)], attention.grid(i));
  const int64_t batch = attention.batch(), heads = attention.heads();
  const int64_t queries = attention.queries(), keys = attention.keys();
  const int64_t width = attention.width(kValue);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({batch, heads, queries, width}),
                    "grad has shape ", grad.sizes(), ".");
  check_tensor("total", total, {at::kFloat}, {batch, heads, queries, 1});
  const Tensor above = matrices_of(grad), divisors = total.contiguous();
  const float* totals = divisors.const_data_ptr<float>();

  // Some items with one head are a task: the bias of a head collects from all items, and each task
  // has its own sum of them. The tasks do not depend on the number of threads.
  constexpr int64_t kParts = 16;
  const int64_t parts = std::max<int64_t>(std::min(batch, kParts), 1);
  const int64_t tasks = parts * heads;
  std::vector<Tensor> grads;
  std::array<float*, kInputs> to = {};
  for (size_t i = 0; i < kInputs; ++i) {
    grads.push_back(at::empty(states[i].sizes(), at::kFloat));
    to[i] = grads[i].mutable_data_ptr<float>();
  }
  const Tensor bias_parts =
      bias.has_value() ? at::zeros({parts, heads, queries, keys}, at::kFloat) : Tensor();
  std::vector<OperandSums> sums;
  for (int i = 0; i < kInputs; ++i) {
    sums.emplace_back(attention.scale(i), attention.pairs() * attention.length(i), tasks);
  }
  // The softmax gives a number a row whatever the scale.
  std::vector<float> of_probs[2];
  for (auto& part : of_probs) part.resize(static_cast<size_t>(attention.pairs() * queries));
  const TrainingKernels& kernel = *kernel_set().training;

  const auto backward_pair = [&](int64_t pair, int64_t task, const Space& space) {
    for (int i = 0; i < kInputs; ++i) {
      with_state(states[static_cast<size_t>(i)], [&](const auto& of_state, const auto* codes) {
        of_state.decode(codes + pair * attention.area(i), pair * attention.length(i),
                        attention.length(i), attention.width(i), *attention.scale(i),
                        space.operand(i));
      });
    }
    const Tensor q = matrix(space.operand(kQuery), queries, attention.width(kQuery));
    const Tensor k = matrix(space.operand(kKey), keys, attention.width(kKey));
    const Tensor v = matrix(space.operand(kValue), keys, width);
    const float* from = above.const_data_ptr<float>() + pair / heads * above.stride(0) +
                        pair % heads * above.stride(1);
    for (int64_t i = 0; i < queries; ++i, from += above.stride(2)) {
      const float divisor = row_relative ? 1.0f / totals[pair * queries + i] : 1.0f;
      float* row = space.rows(0) + i * width;
      for (int64_t j = 0; j < width; ++j) row[j] = from[j] * divisor;
    }
    const Tensor above_here = matrix(space.rows(0), queries, width);
    Tensor scores = matrix(space.scores(), queries, keys);
    Tensor grad_scores = matrix(space.grad_scores(), queries, keys);
    at::mm_out(scores, q, k.t());
    at::mm_out(grad_scores, above_here, v.t());
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t row = pair * queries + i;
      kernel.softmax_backward(attention.rows().row(row, space.scores() + i * keys),
                              *attention.scale(kProbs), row, row_relative,
                              space.grad_scores() + i * keys, space.line(),
                              {of_probs[0].data() + row, of_probs[1].data() + row});
    }
    if (bias_parts.defined()) {
      float* sum = bias_parts.mutable_data_ptr<float>() + task * queries * keys;
      for (int64_t i = 0; i < queries * keys; ++i) sum[i] += space.grad_scores()[i];
    }
    const auto finish = [&](int operand, const Tensor& a, const Tensor& b, double scaled) {
      const int64_t length = attention.length(operand), columns = attention.width(operand);
      Tensor product = matrix(space.rows(1), length, columns);
      at::addmm_out(product, product, a, b, 0, scaled);
      const auto index = static_cast<size_t>(operand);
      with_state(states[index], [&](const auto& of_state, const auto* codes) {
        const int64_t at = pair * length * columns;
        of_state.backward(space.rows(1), codes + at, pair * length, length, columns,
                          *attention.scale(operand), to[index] + at,
                          sums[index].of(task, pair * length));
      });
    };
    finish(kValue, scores.t(), above_here, 1.0);
    finish(kQuery, grad_scores, k, factor);
    finish(kKey, grad_scores.t(), q, factor);
  };
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const c10::InferenceMode without_autograd;
    const Space space(attention);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / heads, head = task % heads;
      for (int64_t item = part * batch / parts; item < (part + 1) * batch / parts; ++item) {
        backward_pair(item * heads + head, task, space);
      }
    }
  });

  std::vector<Tensor> result;
  for (const Tensor& part : grads) result.push_back(part.to(grad.scalar_type()));
  result.push_back(bias_parts.defined() ? bias_parts.sum(0) : at::empty({0}, grad.options()));
  std::array<std::vector<Tensor>, 2> learned;
  for (int i = 0; i < kOperands; ++i) {
    const auto index = static_cast<size_t>(i);
    const Tensor& like = scales[index];
    const auto [of_scale, of_offset] =
        i == kProbs ? sum_rows(of_probs, attention.pairs() * queries, *attention.scale(i), like)
                    : sums[index].total(attention.scale(i), like,
                                        attention.pairs() * attention.length(i), tasks);
    learned[0].push_back(of_scale);
    learned[1].push_back(of_offset);
  }
  for (const auto& kind : learned) result.insert(result.end(), kind.begin(), kind.end());
  return result;
}

}  // namespace
}  // namespace gplq_mm

TORCH_LIBRARY_IMPL(gplq_mm, CPU, m) {
  m.impl("softmax_fake_quant_", gplq_mm::softmax_fake_quant_);
  m.impl("softmax_fake_quant_backward_", gplq_mm::softmax_fake_quant_backward_);
  m.impl("attention_fake_quant", gplq_mm::attention_fake_quant);
  m.impl("attention_fake_quant_backward", gplq_mm::attention_fake_quant_backward);
}
