// What a function has found for a problem, so that it is not computed again on every call of a training loop.
// Host code; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace dlfast {

// The numbers that tell one problem from another. Lists of varying length must be added with their length.
class MemoKey {
 public:
  MemoKey(std::initializer_list<int64_t> numbers) : numbers_(numbers) {}
  explicit MemoKey(std::vector<int64_t> numbers) : numbers_(std::move(numbers)) {}

  const std::vector<int64_t>& numbers() const { return numbers_; }

  void add(std::initializer_list<int64_t> numbers) {
    numbers_.insert(numbers_.end(), numbers.begin(), numbers.end());
  }
  template <typename Container>
  void add_list(const Container& list) {
    numbers_.push_back(static_cast<int64_t>(list.size()));
    numbers_.insert(numbers_.end(), list.begin(), list.end());
  }

  bool operator==(const MemoKey& other) const = default;

  struct Hash {
    size_t operator()(const MemoKey& key) const {
      uint64_t hash = 0;
      for (const int64_t n : key.numbers_) {
        hash = (hash ^ static_cast<uint64_t>(n)) * 0x9e3779b97f4a7c15u;  // the golden ratio: spreads its bits
        hash ^= hash >> 29;
      }
      return static_cast<size_t>(hash);
    }
  };

 private:
  std::vector<int64_t> numbers_;
};

template <typename Value>
class Memo {
 public:
  std::optional<Value> find(const MemoKey& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = values_.find(key);
    if (found == values_.end()) return std::nullopt;
    return found->second;
  }

  void put(const MemoKey& key, Value value) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // Sizes that change with every batch must not fill the memory.
    if (values_.size() >= kMost) values_.clear();
    values_.insert_or_assign(key, std::move(value));
  }

  // compute() where nothing is known, without holding anybody up.
  template <typename Compute>
  Value get(const MemoKey& key, Compute&& compute) {
    if (auto known = find(key)) return *std::move(known);
    Value value = compute();
    put(key, value);
    return value;
  }

  // All of it as it is now, in no order.
  std::vector<std::pair<MemoKey, Value>> entries() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {values_.begin(), values_.end()};
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    values_.clear();
  }

 private:
  static constexpr size_t kMost = 10000;
  std::mutex mutex_;
  std::unordered_map<MemoKey, Value, MemoKey::Hash> values_;
};

}  // namespace dlfast
