// The product of activation codes and a packed layer, on all threads.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstddef>
#include <new>

#include "checks.h"
#include "kernel_set.h"
#include "parallel.h"

namespace gplq_mm {

// What a buffer is for; each has its own memory in each thread.
enum class Use { panel, window, codes, hidden_codes };

// Memory of a thread that is kept for its next use; grows, never shrinks. Allocating afresh
// would make the kernel clear the pages each time, which costs several percent of a layer.
template <Use use, typename Value>
Value* thread_buffer(int64_t count) {
  struct Buffer {
    ~Buffer() { ::operator delete[](data, std::align_val_t{64}); }
    void* data = nullptr;
    int64_t bytes = 0;
  };
  thread_local Buffer buffer;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(Value));
#if defined(__SANITIZE_ADDRESS__)
  // Exactly what was asked for, so that a step beyond it is seen.
  const bool fits = bytes == buffer.bytes;
#else
  const bool fits = bytes <= buffer.bytes;
#endif
  if (!fits) {
    ::operator delete[](buffer.data, std::align_val_t{64});
    buffer.data = nullptr;
    buffer.bytes = 0;
    buffer.data = ::operator new[](static_cast<size_t>(bytes), std::align_val_t{64});
    buffer.bytes = bytes;
  }
  return static_cast<Value*>(buffer.data);
}

// Bytes from one row of codes to the next.
inline int64_t code_stride(int64_t columns) { return round_up(columns, 64); }

// Codes (rows, code_stride(columns)) while an op runs: in a kept buffer of the calling thread,
// or, where they are large, in memory of their own.
template <Use use>
class Codes {
 public:
  Codes(int64_t rows, int64_t columns) : rows_(rows), stride_(code_stride(columns)) {
    constexpr int64_t kKept = 1 << 24;
    const int64_t bytes = rows_ * stride_;
    if (bytes > kKept) own_ = at::empty({bytes}, at::kByte);
    data_ = own_.defined() ? own_.mutable_data_ptr<uint8_t>() : thread_buffer<use, uint8_t>(bytes);
  }
  Codes(Codes&&) = default;
  Codes& operator=(Codes&&) = delete;

  int64_t rows() const { return rows_; }
  int64_t stride() const { return stride_; }
  uint8_t* row(int64_t index) const { return data_ + index * stride_; }

 private:
  int64_t rows_, stride_;
  at::Tensor own_;
  uint8_t* data_;
};

// How rows are cut into chunks; a task is one chunk times one panel.
struct Plan {
  int64_t chunk_rows, chunks;
};

// Chooses the chunks so that the threads end at the same time. A chunk of codes stays in the
// second-level cache while the panels pass by; unpacking a panel again for each chunk costs about
// as much as ten more rows.
inline Plan plan_product(int64_t rows, int64_t panels, int64_t stride, int64_t threads) {
  constexpr int64_t kTile = 6, kCacheBytes = 1 << 20, kUnpackRows = 10, kMostRows = 528;
  const int64_t most_rows =
      std::clamp<int64_t>(kCacheBytes / stride / kTile * kTile, kTile * 8, kMostRows);
  const int64_t fewest = (rows + most_rows - 1) / most_rows;
  Plan best = {};
  int64_t best_cost = 0;
  for (int64_t chunks = fewest; chunks <= fewest + threads; ++chunks) {
    const int64_t chunk_rows = round_up((rows + chunks - 1) / chunks, kTile);
    const int64_t real = (rows + chunk_rows - 1) / chunk_rows;
    const int64_t turns = (real * panels + threads - 1) / threads;
    const int64_t cost = turns * (chunk_rows + kUnpackRows);
    if (best.chunks == 0 || cost < best_cost) {
      best = {chunk_rows, real};
      best_cost = cost;
    }
  }
  return best;
}

// Codes times the layer. epilogue_of(panel) says what becomes of the sums of a panel, its
// pointers those of row 0.
template <Use use, typename EpilogueOf>
void multiply(const Codes<use>& codes, const Layer& layer, const EpilogueOf& epilogue_of) {
  const int64_t rows = codes.rows(), stride = codes.stride();
  if (rows == 0) return;
  constexpr int64_t kGrainProducts = 1 << 20;
  const Kernels& kernel = *kernel_set().kernels;
  const int64_t columns = layer.columns(), panels = layer.panels();
  const Plan plan = plan_product(rows, panels, stride, at::get_num_threads());
  const int64_t task = std::min(plan.chunk_rows, rows) * columns * kPanel;
  const int64_t grain = (kGrainProducts + task - 1) / task;
  parallel_for(0, plan.chunks * panels, grain, [&](int64_t begin, int64_t end) {
    auto* panel = thread_buffer<Use::panel, int8_t>(round_up(columns, kStep) * kPanel);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = i % panels, first = i / panels * plan.chunk_rows;
      const int64_t count = std::min(plan.chunk_rows, rows - first);
      Epilogue epilogue = epilogue_of(index);
      const int64_t size = epilogue.kind == Output::gelu_codes ? 1 : 4;
      epilogue.out = static_cast<char*>(epilogue.out) + first * epilogue.out_stride * size;
      if (epilogue.residual != nullptr) epilogue.residual += first * epilogue.residual_stride;
      kernel.unpack(layer.panel(index), panel);
      Product product = {};
      product.codes = codes.row(first);
      product.stride = stride;
      product.rows = count;
      product.columns = columns;
      product.panel = panel;
      product.max_code = layer.max_code();
      if (i + 1 < end) {
        product.upcoming = layer.panel((i + 1) % panels).weight;
        product.upcoming_bytes = layer.panel_bytes();
      }
      kernel.multiply(product, epilogue);
    }
  });
}

}  // namespace gplq_mm
