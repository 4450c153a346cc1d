// Kernels of training for machines without the other instruction sets.
#include "training_impl.h"

namespace gplq_mm {

const TrainingKernels* portable_training() { return training_table(); }

}  // namespace gplq_mm
