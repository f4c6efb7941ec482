// Chunks, threads and passes of the CPU optimizer step. The arithmetic is in step.h, the loops over a block
// in body.h; here is the one traversal that all algorithms and options share.
//
// Every thread walks its share of the tensors. A first pass, where asked for, takes the norm of the
// gradients, a second the norms that a rule measures; the last updates. A chunk of a tensor is brought into
// the form the rule computes with (in place where it lies so), updated, and what the options ask for is done
// to it while it is in the first cache: each array is read once and written once.
#include "optim/cpu/step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "optim/formats.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dlfast::optim {
namespace {

// Elements that are handled at a time: five arrays of floats fit into the first cache.
constexpr int64_t kChunk = 1024;
// Elements whose squares are summed in one go, so that sums do not depend on the threads.
constexpr int64_t kUnit = 4 * kChunk;
static_assert(kChunk % kCodeBlock == 0 && kChunk % 64 == 0);
// What a tensor costs beside its elements, in elements.
constexpr int64_t kTensorCost = 256;
// Elements below which starting another thread costs more than the work.
constexpr int64_t kThreadShare = 24 * 1024;

// Runs f(rank, size) on a team of at most `threads` threads, which meet at meet().
template <typename F>
void run_team(int threads, F&& f) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    f(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  f(0, 1);
}

void meet() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// A tensor's Rule::Constants, whatever the rule and the type.
struct alignas(16) Constants {
  std::byte bytes[16 * sizeof(double)];
};

Constants prepare(Algorithm algorithm, const double* group, const StepFacts& facts, bool wide) {
  Constants out;
  with_rule(algorithm, [&](auto rule) {
    using Rule = decltype(rule);
    static_assert(sizeof(typename Rule::Group) <= kMaxHyper * sizeof(double));
    static_assert(sizeof(typename Rule::template Constants<double>) <= sizeof(Constants));
    typename Rule::Group hyper;
    std::memcpy(&hyper, group, sizeof(hyper));
    if (wide) {
      const auto c = Rule::template prepare<double>(hyper, facts);
      std::memcpy(&out, &c, sizeof(c));
    } else {
      const auto c = Rule::template prepare<float>(hyper, facts);
      std::memcpy(&out, &c, sizeof(c));
    }
  });
  return out;
}

// One thread's room for a chunk in the form that rules compute with.
struct alignas(64) Room {
  float param[kChunk];
  double grad[kChunk];  // or floats
  float state[kMaxStates][kChunk];
  uint16_t random[kChunk];
};

struct Chunk {
  void* param;
  const void* grad;
  void* state[kMaxStates];
};

class Traversal {
 public:
  Traversal(const CpuStep& step) : step_(step), kernels_(step_kernels()) {
    const auto rule = static_cast<int>(step.algorithm);
    for (const int wide : {0, 1}) {
      for (int s = 0; s <= kMaxStates; ++s) update_[s][wide] = kernels_.update[rule][s][wide];
      measure_[wide] = kernels_.measure[rule][wide];
    }
  }

  bool measures() const { return measure_[0] != nullptr; }

  // The squares of the unscaled, clipped gradients of elements [first, last) of a tensor, summed.
  double squares(const TensorRef& t, int64_t first, int64_t last, Room& room) const {
    const bool wide = t.number == Format::float64;
    double sum = 0;
    for (int64_t at = first; at < last; at += kChunk) {
      const int64_t count = std::min(kChunk, last - at);
      sum += kernels_.squares[wide](gradient(t, at, count, room), count);
    }
    if (clamps()) return sum;
    return sum * step_.options.grad_factor * step_.options.grad_factor;
  }

  void measure(const TensorRef& t, int64_t first, int64_t last, const Constants& constants, Room& room,
               double* sums) const {
    for (int64_t at = first; at < last; at += kChunk) {
      const int64_t count = std::min(kChunk, last - at);
      const Chunk chunk = load(t, at, count, room);
      measure_[t.number == Format::float64](chunk.param, chunk.grad, chunk.state, count, &constants, sums);
    }
  }

  void update(const TensorRef& t, int64_t first, int64_t last, const Constants& constants, Room& room) const {
    const bool wide = t.number == Format::float64;
    int states = 0;
    while (states < kMaxStates && t.state[states] != nullptr) ++states;
    const UpdateFn update = update_[states][wide];
    for (int64_t at = first; at < last; at += kChunk) {
      const int64_t count = std::min(kChunk, last - at);
      const Chunk chunk = load(t, at, count, room);
      update(chunk.param, chunk.grad, chunk.state, count, &constants);
      save(t, at, count, chunk, room);
    }
  }

  void clear_gradient(const TensorRef& t, int64_t first, int64_t count) const {
    const int64_t size = bytes_of(t.number);
    std::memset(static_cast<char*>(t.grad) + first * size, 0, static_cast<size_t>(count * size));
  }

 private:
  bool clamps() const { return step_.options.max_grad_value >= 0; }

  static void* element(void* base, Format format, int64_t at) {
    return static_cast<char*>(base) + at * bytes_of(format);
  }
  static bool in_place(Format format) { return format == Format::float32 || format == Format::float64; }

  const void* gradient(const TensorRef& t, int64_t at, int64_t count, Room& room) const {
    const void* grad = element(t.grad, t.number, at);
    if (!in_place(t.number)) {
      auto* staged = reinterpret_cast<float*>(room.grad);
      kernels_.load(t.number, t.grad, nullptr, at, count, staged);
      grad = staged;
    }
    if (!clamps()) return grad;
    const StepOptions& options = step_.options;
    kernels_.clamp[t.number == Format::float64](grad, options.grad_factor, options.max_grad_value, count,
                                                room.grad);
    return room.grad;
  }

  Chunk load(const TensorRef& t, int64_t at, int64_t count, Room& room) const {
    Chunk chunk{.param = nullptr, .grad = gradient(t, at, count, room), .state = {}};
    if (t.master_kind == Master::full) {
      chunk.param = static_cast<float*>(t.master) + at;
    } else if (t.master_kind == Master::low_half) {
      kernels_.join_halves(element(t.param, t.number, at), element(t.master, t.number, at), count,
                           room.param);
      chunk.param = room.param;
    } else if (in_place(t.number)) {
      chunk.param = element(t.param, t.number, at);
    } else {
      kernels_.load(t.number, t.param, nullptr, at, count, room.param);
      chunk.param = room.param;
    }
    for (int k = 0; k < kMaxStates && t.state[k] != nullptr; ++k) {
      if (in_place(t.state_format[k])) {
        chunk.state[k] = element(t.state[k], t.state_format[k], at);
        continue;
      }
      kernels_.load(t.state_format[k], t.state[k], t.scale[k], at, count, room.state[k]);
      chunk.state[k] = room.state[k];
    }
    return chunk;
  }

  const uint16_t* random(const TensorRef& t, uint32_t slot, int64_t at, int64_t count, Room& room) const {
    kernels_.random(step_.options.seed, step_.options.random_step, random_stream(t.id, slot), at, count,
                    room.random);
    return room.random;
  }

  void save(const TensorRef& t, int64_t at, int64_t count, const Chunk& chunk, Room& room) const {
    for (uint32_t k = 0; k < kMaxStates && t.state[k] != nullptr; ++k) {
      if (in_place(t.state_format[k])) continue;
      const uint16_t* draws = t.stochastic_state ? random(t, k + 1, at, count, room) : nullptr;
      kernels_.save(t.state_format[k], room.state[k], draws, at, count, t.state[k], t.scale[k]);
    }
    if (t.master_kind == Master::low_half) {
      kernels_.split_halves(room.param, count, element(t.param, t.number, at),
                            element(t.master, t.number, at));
    } else if (!in_place(t.number)) {
      const auto* exact = static_cast<const float*>(chunk.param);
      if (t.master_kind == Master::full && count % kChunk != 0) {
        // Saving reads whole vectors.
        std::memcpy(room.param, exact, static_cast<size_t>(count) * sizeof(float));
        exact = room.param;
      }
      const uint16_t* draws = t.stochastic_param ? random(t, 0, at, count, room) : nullptr;
      kernels_.save(t.number, exact, draws, at, count, t.param, nullptr);
    }
    if (t.average != nullptr) {
      const bool wide = t.number == Format::float64;
      const void* weights = chunk.param;
      if (t.master_kind == Master::none && !in_place(t.number)) {
        kernels_.load(t.number, t.param, nullptr, at, count, room.param);  // as rounded
        weights = room.param;
      }
      void* average = element(t.average, wide ? Format::float64 : Format::float32, at);
      kernels_.average[wide](average, weights, step_.options.average_decay, count);
    }
    if (step_.options.zero_grad) clear_gradient(t, at, count);
  }

  const CpuStep& step_;
  const CpuKernels& kernels_;
  UpdateFn update_[kMaxStates + 1][2];
  MeasureFn measure_[2];
};

double steps_taken(const TensorRef& t) {
  if (t.step == nullptr) return 0;
  return t.step_is_double ? *static_cast<const double*>(t.step) : *static_cast<const float*>(t.step);
}

void advance(const TensorRef& t) {
  if (t.step == nullptr) return;
  if (t.step_is_double) {
    *static_cast<double*>(t.step) += 1;
  } else {
    *static_cast<float*>(t.step) += 1;
  }
}

std::vector<int64_t> numels_of(const CpuStep& step) {
  std::vector<int64_t> numels;
  numels.reserve(step.tensors.size());
  for (const TensorRef& t : step.tensors) numels.push_back(t.numel);
  return numels;
}

// Calls f(tensor index, first, last) for the units between two positions.
template <typename F>
void for_units(const CpuStep& step, Position from, Position to, F&& f) {
  for (int64_t i = from.tensor; i <= to.tensor && i < static_cast<int64_t>(step.tensors.size()); ++i) {
    const int64_t end = i == to.tensor ? to.element : step.tensors[i].numel;
    for (int64_t at = i == from.tensor ? from.element : 0; at < end; at += kUnit) {
      f(i, at, std::min(at + kUnit, end));
    }
  }
}

// The same from the end: after a pass forwards, what it has read last is still in the cache.
template <typename F>
void for_units_backwards(const CpuStep& step, Position from, Position to, F&& f) {
  for (int64_t i = std::min(to.tensor, static_cast<int64_t>(step.tensors.size()) - 1); i >= from.tensor;
       --i) {
    const int64_t end = i == to.tensor ? to.element : step.tensors[i].numel;
    const int64_t begin = i == from.tensor ? from.element : 0;
    for (int64_t at = begin + (end - begin - 1) / kUnit * kUnit; at >= begin && at < end; at -= kUnit) {
      f(i, at, std::min(at + kUnit, end));
    }
  }
}

int team_size(const std::vector<int64_t>& numels, int threads) {
  int64_t elements = 0;
  for (const int64_t n : numels) elements += n;
  return static_cast<int>(std::clamp<int64_t>(elements / kThreadShare, 1, std::max(threads, 1)));
}

// The quotient of the norms that a rule has measured over the units of a tensor: of param and direction.
double trust_of(const TensorRef& t, const std::vector<double>& measured) {
  double of_param = 0, of_direction = 0;
  for (int64_t u = t.first_unit; u < t.first_unit + units_of(t.numel, kUnit); ++u) {
    of_param += measured[2 * static_cast<size_t>(u)];
    of_direction += measured[2 * static_cast<size_t>(u) + 1];
  }
  return of_param > 0 && of_direction > 0 ? std::sqrt(of_param / of_direction) : 1;
}

double sum(const std::vector<double>& parts) {
  double total = 0;
  for (const double part : parts) total += part;
  return total;
}

}  // namespace

std::vector<Position> split_work(const std::vector<int64_t>& numels, int parts) {
  const auto count = static_cast<int64_t>(numels.size());
  int64_t total = 0;
  for (const int64_t n : numels) total += n + kTensorCost;
  std::vector<Position> positions;
  int64_t tensor = 0, before = 0;
  for (int part = 0; part < parts; ++part) {
    const int64_t wanted = total / parts * part + total % parts * part / parts;
    while (tensor < count && before + numels[tensor] + kTensorCost <= wanted) {
      before += numels[tensor++] + kTensorCost;
    }
    const int64_t inside = tensor < count ? std::min(wanted - before, numels[tensor]) : 0;
    positions.push_back({tensor, inside / kUnit * kUnit});
  }
  positions.push_back({count, 0});
  return positions;
}

double squares_cpu(CpuStep& step, int threads) {
  const auto count = static_cast<int64_t>(step.tensors.size());
  std::vector<double> parts(static_cast<size_t>(number_units(step.tensors.data(), count, kUnit)));
  const std::vector<int64_t> numels = numels_of(step);
  const Traversal traversal(step);
  run_team(team_size(numels, threads), [&](int rank, int size) {
    Room room;
    const auto positions = split_work(numels, size);
    for_units(step, positions[rank], positions[rank + 1], [&](int64_t i, int64_t first, int64_t last) {
      const TensorRef& t = step.tensors[i];
      parts[static_cast<size_t>(t.first_unit + first / kUnit)] = traversal.squares(t, first, last, room);
    });
  });
  return sum(parts);
}

CpuResult step_cpu(CpuStep& step, int threads) {
  const auto count = static_cast<int64_t>(step.tensors.size());
  const StepOptions& options = step.options;
  const auto units = static_cast<size_t>(number_units(step.tensors.data(), count, kUnit));
  const Traversal traversal(step);
  std::vector<double> squares(options.measure_norm ? units : 0);
  std::vector<double> measured(traversal.measures() ? 2 * units : 0);
  const std::vector<int64_t> numels = numels_of(step);
  CpuResult result;

  run_team(team_size(numels, threads), [&](int rank, int size) {
    Room room;
    const auto positions = split_work(numels, size);
    const Position from = positions[rank], to = positions[rank + 1];
    // The clamped gradient is unscaled already.
    double factor = options.clip_factor * (options.max_grad_value >= 0 ? 1 : options.grad_factor);
    bool skipped = false;
    if (options.measure_norm) {
      for_units(step, from, to, [&](int64_t i, int64_t first, int64_t last) {
        const TensorRef& t = step.tensors[i];
        squares[static_cast<size_t>(t.first_unit + first / kUnit)] = traversal.squares(t, first, last, room);
      });
      meet();
      const double norm = std::sqrt(sum(squares));
      skipped = options.skip_if_not_finite && !std::isfinite(norm);
      if (options.max_grad_norm >= 0) factor *= clip_factor(norm, options.max_grad_norm);
      if (rank == 0) result = {.norm = norm, .skipped = skipped};
    }
    if (skipped) {
      if (!options.zero_grad) return;
      for_units(step, from, to, [&](int64_t i, int64_t first, int64_t last) {
        traversal.clear_gradient(step.tensors[i], first, last - first);
      });
      return;
    }

    // Consecutive tensors are mostly of one group and age, and share their constants.
    Constants constants;
    int64_t of = -1;
    double age = -1, trusted = -1;
    const auto constants_of = [&](int64_t i, double trust) -> const Constants& {
      const TensorRef& t = step.tensors[i];
      const double taken = steps_taken(t);
      const bool same = of >= 0 && t.group == step.tensors[of].group && taken == age && trust == trusted &&
                        (t.number == Format::float64) == (step.tensors[of].number == Format::float64);
      if (!same) {
        const double* group = &step.groups[static_cast<size_t>(t.group) * kMaxHyper];
        constants = prepare(step.algorithm, group, {.step = taken + 1, .grad_factor = factor, .trust = trust},
                            t.number == Format::float64);
      }
      of = i, age = taken, trusted = trust;
      return constants;
    };

    if (traversal.measures()) {
      for_units(step, from, to, [&](int64_t i, int64_t first, int64_t last) {
        const TensorRef& t = step.tensors[i];
        double* sums = &measured[2 * static_cast<size_t>(t.first_unit + first / kUnit)];
        traversal.measure(t, first, last, constants_of(i, 1), room, sums);
      });
      meet();
    }
    int64_t last_tensor = -1;
    double trust = 1;
    const auto update = [&](int64_t i, int64_t first, int64_t last) {
      const TensorRef& t = step.tensors[i];
      if (traversal.measures() && i != last_tensor) {
        trust = trust_of(t, measured);
        last_tensor = i;
      }
      traversal.update(t, first, last, constants_of(i, trust), room);
    };
    if (options.measure_norm || traversal.measures()) {
      for_units_backwards(step, from, to, update);
    } else {
      for_units(step, from, to, update);
    }
  });
  if (!result.skipped) {
    for (const TensorRef& t : step.tensors) advance(t);
  }
  return result;
}

}  // namespace dlfast::optim
