// Loops on torch's own threads.
#pragma once

#include <ATen/Parallel.h>
#include <torch/csrc/stable/c/shim.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>

namespace gplq_mm {

// body(begin, end) over disjoint ranges of [begin, end). at::parallel_for is a template that
// must be compiled with OpenMP and would bring its own OpenMP library; this calls the one
// inside torch, so both use the same threads.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (end - begin <= grain || at::get_num_threads() == 1) {
    if (begin < end) body(begin, end);
    return;
  }
  auto call = [](int64_t from, int64_t to, void* context) {
    (*static_cast<const Body*>(context))(from, to);
  };
  const auto status = torch_parallel_for(begin, end, grain, call, const_cast<Body*>(&body));
  TORCH_CHECK(status == 0, "gplq_mm: a parallel loop failed, see the message above.");
}

// body(first, count) over ranges of rows, each large enough to be worth a thread of its own.
template <typename Body>
void for_rows(int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t kGrainElements = 1 << 14;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / columns);
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { body(begin, end - begin); });
}

}  // namespace gplq_mm
