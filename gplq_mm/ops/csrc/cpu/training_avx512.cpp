// Kernels of training for AVX-512.
#include <cstdint>

#include "training.h"

#if defined(__x86_64__)

#define GPLQ_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#include "target_begin.h"

#include "training_impl.h"

namespace gplq_mm {

const TrainingKernels* avx512_training() { return training_table(); }

}  // namespace gplq_mm

#include "target_end.h"
#else
namespace gplq_mm {
const TrainingKernels* avx512_training() { return nullptr; }
}  // namespace gplq_mm
#endif
