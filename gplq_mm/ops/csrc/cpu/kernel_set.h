// The kernels of every instruction set.
#pragma once

#include "attention.h"
#include "kernels.h"
#include "training.h"

namespace gplq_mm {

struct KernelSet {
  const Kernels* kernels;
  const AttentionKernel* attention;
  const TrainingKernels* training;
};

// Null where the compiler does not target the machine.
const KernelSet* portable_set();
const KernelSet* avx2_set();
const KernelSet* avx_vnni_set();
const KernelSet* avx512_vnni_set();

// That of the instruction set in use; throws if the environment variable GPLQ_MM_ISA asks for one
// that does not exist or that this machine lacks.
const KernelSet& kernel_set();

}  // namespace gplq_mm
