// Chunks, threads and constants of the CPU optimizer step; the arithmetic is in cpu_body.h.
#include "optim/cpu_step.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "optim/step.h"

namespace dlfast::optim {
namespace {

// Elements that one thread takes at least; a multiple of every vector width, so that only a tensor's last
// unit has a tail.
constexpr int64_t kUnit = 1024;
// Units below which starting threads costs more than the work.
constexpr int64_t kGrain = 16;

const UpdateTable& updates() {
#if DLFAST_X86
  switch (simd_level()) {
    case SimdLevel::avx512:
      return updates_avx512();
    case SimdLevel::avx2:
      return updates_avx2();
    default:
      break;
  }
#endif
  return updates_portable();
}

UpdateFn update_of(const Sgd*, Number number) {
  return updates().sgd[static_cast<int>(number)];
}
UpdateFn update_of(const Adam*, Number number) {
  return updates().adam[static_cast<int>(number)];
}

template <typename Rule, typename T>
void run(UpdateFn update, std::vector<TensorRef>& tensors, const std::vector<double>& steps,
         const std::vector<typename Rule::Group>& groups, double grad_factor) {
  const auto count = static_cast<int64_t>(tensors.size());
  std::vector<typename Rule::template Constants<T>> constants;
  constants.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    // Consecutive tensors are mostly of one group and age.
    if (i > 0 && tensors[i].group == tensors[i - 1].group && steps[i] == steps[i - 1]) {
      constants.push_back(constants.back());
      continue;
    }
    const auto& group = groups[static_cast<size_t>(tensors[i].group)];
    constants.push_back(Rule::template prepare<T>(group, group.lr.value, steps[i], grad_factor));
  }
  const int64_t units = number_units(tensors.data(), count, kUnit);
  at::parallel_for(0, units, kGrain, [&](int64_t first, int64_t last) {
    const auto after = std::upper_bound(tensors.begin(), tensors.end(), first,
                                        [](int64_t u, const TensorRef& t) { return u < t.first_unit; });
    for (int64_t i = after - tensors.begin() - 1; i < count && tensors[i].first_unit < last; ++i) {
      const TensorRef& t = tensors[i];
      const int64_t begin = std::max<int64_t>(first - t.first_unit, 0) * kUnit;
      const int64_t end = std::min((last - t.first_unit) * kUnit, t.numel);
      if (begin < end) update(t, &constants[i], begin, end);
    }
  });
}

}  // namespace

template <typename Rule>
void step_cpu(Number number, std::vector<TensorRef>& tensors, const std::vector<double>& steps,
              const std::vector<typename Rule::Group>& groups, double grad_factor) {
  const UpdateFn update = update_of(static_cast<const Rule*>(nullptr), number);
  if (number == Number::float64) {
    run<Rule, double>(update, tensors, steps, groups, grad_factor);
  } else {
    run<Rule, float>(update, tensors, steps, groups, grad_factor);
  }
}

template void step_cpu<Sgd>(Number, std::vector<TensorRef>&, const std::vector<double>&,
                            const std::vector<SgdGroup>&, double);
template void step_cpu<Adam>(Number, std::vector<TensorRef>&, const std::vector<double>&,
                             const std::vector<AdamGroup>&, double);

}  // namespace dlfast::optim
