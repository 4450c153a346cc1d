// What the loops of training's kernels are made of: rounding, integers, gradients of one value,
// sums in lanes. Compilers make vectors of these loops; the including file sets the target. Where
// one is inlined, what __restrict says of its tensors is lost: `ivdep` says it of the loop. All
// names are local to the translation unit, see kernels_impl.h.
#pragma once

#include "kernels_impl.h"
#include "training.h"

namespace gplq_mm {
namespace {

// A choice that is made when compiling.
template <bool flag>
struct Flag {
  static constexpr bool value = flag;
};

// Calls work with a Flag for every bool.
template <typename Work>
inline void with_flags(const Work& work) {
  work();
}
template <typename Work, typename... Flags>
inline void with_flags(const Work& work, bool flag, Flags... rest) {
  if (flag) {
    with_flags([&](auto... flags) { work(Flag<true>(), flags...); }, rest...);
  } else {
    with_flags([&](auto... flags) { work(Flag<false>(), flags...); }, rest...);
  }
}

// Lanes that sums and maxima of a row run in; loops over them become vectors.
constexpr int64_t kLanes = 16;
// A value this far outside of the grid still counts as inside, see gplq_mm/quant/functional.py.
constexpr float kTolerance = 1e-4f;

// a * b + c where its rounding does not decide a code.
inline float madd(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

struct Range {
  explicit Range(const LearnedGrid& grid)
      : low(static_cast<float>(grid.code_min)), high(static_cast<float>(grid.code_max)) {}

  // Nearest code of a value in steps, half to even. NaN stays.
  float code(float steps) const {
    // 1.5 * 2^23: a sum with |steps| < 2^22 has no fraction left.
    constexpr float kRounder = 12582912.0f;
    steps = steps < low ? low : steps;
    steps = steps > high ? high : steps;
    return (steps + kRounder) - kRounder;
  }
  bool holds(float steps) const { return steps >= low - kTolerance && steps <= high + kTolerance; }

  float low, high;
};

struct Levels {
  explicit Levels(const LearnedGrid& grid)
      : bits(grid.level_bits),
        mask((1 << grid.level_bits) - 1),
        middle(1 << (grid.level_bits - 1)),
        last(grid.code_max - grid.code_min),
        count(static_cast<float>(mask)),
        width(1.0f / static_cast<float>(mask)) {}

  // Level of a value whose code is `code`.
  int32_t level(float steps, float code, const Range& range) const {
    constexpr float kRounder = 12582912.0f;
    // What lies outside is moved to the half of the levels that no inner value of its code has.
    float place = (code - steps) * count;
    place = steps < range.low - kTolerance ? count : place;
    place = steps > range.high + kTolerance ? -count : place;
    place = (place + kRounder) - kRounder;
    const float end = static_cast<float>(middle - 1);
    // Ordered so that NaN becomes a level, too.
    place = place > -end ? place : -end;
    place = place < end ? place : end;
    return static_cast<int32_t>(place) + middle;
  }
  // code - steps in the middle of a level.
  float residual(int32_t level) const { return static_cast<float>(level - middle) * width; }
  bool outside(int32_t code, int32_t level) const {
    // Without branches or short circuits, which would keep the loop scalar.
    return ((code == 0) & (level > middle)) | ((code == last) & (level < middle));
  }

  int bits;
  int32_t mask, middle, last;
  float count, width;
};

// Writes the integers that the codes code_at(0), code_at(1)... stand for by a table, as floats; NaN
// stays. Without a table there is nothing to write: a code is its integer.
template <typename Machine, bool tabled, typename CodeAt>
inline void write_integers(const uint8_t* table, int64_t columns, float* __restrict integers,
                           const CodeAt& code_at) {
  if (!tabled) return;
#pragma GCC ivdep
  for (int64_t k = 0; k < columns; ++k) integers[k] = code_at(k);
  const typename Machine::Table levels(table);
  const auto integer_of = [&](typename Machine::Real code) {
    const auto found = Machine::to_real(levels.lanes(Machine::to_int(code)));
    return Machine::add(found, Machine::sub(code, code));
  };
  int64_t k = 0;
  for (; k + Machine::kWidth <= columns; k += Machine::kWidth) {
    Machine::store(integers + k, integer_of(Machine::load(integers + k)));
  }
  if (k < columns) {
    const auto code = Machine::load_part(integers + k, columns - k);
    Machine::store_part(integers + k, integer_of(code), columns - k);
  }
}

// What one value adds to the gradients.
struct Share {
  float x, scale, offset;
};

// residual: integer - steps.
inline Share share_of(float grad, bool outside, float integer, float residual) {
  return {outside ? 0.0f : grad, grad * (outside ? integer : residual), outside ? grad : 0.0f};
}

// Sum or maximum over lanes.
template <typename Combine>
inline float lanes_to_one(const float (&lanes)[kLanes], const Combine& combine) {
  float rest[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) rest[i] = lanes[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) rest[i] = combine(rest[i], rest[i + width]);
  }
  return rest[0];
}

inline float sum_of(const float (&lanes)[kLanes]) {
  return lanes_to_one(lanes, [](float a, float b) { return a + b; });
}

// exp(x) of x <= 0, relative error below 2e-6 down to the smallest normal number; NaN stays.
inline float exp_of(float x) {
  constexpr float kLog2E = 1.44269504f;
  float y = x * kLog2E;
  y = y < -126.0f ? -126.0f : y;
  const float whole = __builtin_floorf(y);
  const float part = y - whole;
  // The polynomial of gplq_mm/quant/arithmetic.py.
  float value = madd(part, 0.0018671374f, 0.0090170139f);
  value = madd(part, value, 0.055799925f);
  value = madd(part, value, 0.24016445f);
  value = madd(part, value, 0.69315131f);
  value = madd(part, value, 1.0f);
  const int32_t power = (static_cast<int32_t>(whole) + 127) << 23;
  return value * __builtin_bit_cast(float, power);
}

// Phi(x), the normal distribution function, by the polynomial of gplq_mm/quant/arithmetic.py.
inline float phi_of(float x) {
  constexpr float kEnd = 5.2f, kFactor = 0.07396451f;
  float z = x < -kEnd ? -kEnd : x;
  z = z > kEnd ? kEnd : z;
  const float t = madd(z * z, kFactor, -1.0f);
  float value = madd(t, 1.940482471e-04f, -5.545432796e-04f);
  value = madd(t, value, 6.242647069e-04f);
  value = madd(t, value, -9.999474278e-04f);
  value = madd(t, value, 2.637060126e-03f);
  value = madd(t, value, -5.044835620e-03f);
  value = madd(t, value, 8.023252711e-03f);
  value = madd(t, value, -1.236457378e-02f);
  value = madd(t, value, 1.813056692e-02f);
  value = madd(t, value, -2.476078086e-02f);
  value = madd(t, value, 3.196270391e-02f);
  value = madd(t, value, -3.992566466e-02f);
  value = madd(t, value, 5.002609640e-02f);
  value = madd(t, value, -6.774380058e-02f);
  value = madd(t, value, 1.359499842e-01f);
  return madd(z, value, 0.5f);
}

}  // namespace
}  // namespace gplq_mm
