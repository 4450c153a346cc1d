// All kernels of an instruction set; see kernels_impl.h for what they are made of.
#pragma once

#include "attention_impl.h"
#include "kernels_impl.h"
#include "kernel_set.h"
#include "training_impl.h"

namespace gplq_mm {
namespace {

template <typename Vectors>
const KernelSet* kernel_set() {
  static const KernelSet table = {kernel_table<Vectors>(), attention_kernel<Vectors>(),
                                training_kernels<Vectors>()};
  return &table;
}

}  // namespace
}  // namespace gplq_mm
