// Choice of the instruction set at run time.
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernel_set.h"

namespace gplq_mm {
namespace {

constexpr std::array<const char*, kIsaCount> kNames = {"portable", "avx2", "avx_vnni",
                                                       "avx512_vnni"};

const KernelSet* table(int isa) {
  const std::array<const KernelSet* (*)(), kIsaCount> machines = {
      portable_set, avx2_set, avx_vnni_set, avx512_vnni_set};
  return machines[static_cast<size_t>(isa)]();
}

bool machine_has(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (static_cast<Isa>(isa)) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx_vnni:
      return avx2 && __builtin_cpu_supports("avxvnni");
    case Isa::avx512_vnni:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
  }
  return false;
#else
  return isa == static_cast<int>(Isa::portable);
#endif
}

bool usable(int isa) { return table(isa) != nullptr && machine_has(isa); }

std::vector<std::string> usable_names() {
  std::vector<std::string> names;
  for (int isa = 0; isa < kIsaCount; ++isa) {
    if (usable(isa)) names.emplace_back(kNames[isa]);
  }
  return names;
}

int parse(const std::string& name, const char* source) {
  for (int isa = 0; isa < kIsaCount; ++isa) {
    if (name == kNames[isa] && usable(isa)) return isa;
  }
  std::string choices;
  for (const auto& usable_name : usable_names()) {
    choices += (choices.empty() ? "" : ", ") + usable_name;
  }
  TORCH_CHECK_VALUE(false, source, " asks for the instruction set '", name,
                    "'; this machine and build have: ", choices, ".");
}

int choose() {
  const char* wanted = std::getenv("GPLQ_MM_ISA");
  if (wanted != nullptr && *wanted != '\0') return parse(wanted, "GPLQ_MM_ISA");
  int best = 0;
  for (int isa = 0; isa < kIsaCount; ++isa) {
    if (usable(isa)) best = isa;
  }
  return best;
}

constexpr int kUndecided = -1;
std::atomic<int> chosen{kUndecided};

int current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa == kUndecided) {
    isa = choose();
    chosen.store(isa);
  }
  return isa;
}

std::string isa_name() { return kNames[static_cast<size_t>(current_isa())]; }

void set_isa(std::string name) {
  chosen.store(name.empty() ? choose() : parse(name, "set_cpu_isa"));
}

}  // namespace

const KernelSet& kernel_set() { return *table(current_isa()); }

}  // namespace gplq_mm

// For gplq_mm/ops/native.py: the name in use, the usable names from low to high, and a way to
// choose another one ('' for the default).
TORCH_LIBRARY_FRAGMENT(gplq_mm, m) {
  m.def("_cpu_isa() -> str", &gplq_mm::isa_name);
  m.def("_cpu_isas() -> str[]", &gplq_mm::usable_names);
  m.def("_set_cpu_isa(str name) -> ()", &gplq_mm::set_isa);
}
