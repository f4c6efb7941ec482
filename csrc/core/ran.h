// What ran: a counter for each algorithm of each part of an operator, on each kind of device.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string_view>
#include <vector>

namespace dlfast {

struct RanCount {
  const char* op;
  const char* device;  // "cpu" or "cuda"
  const char* part;
  const char* algorithm;
  int64_t count;
};

// The counters of one operator. Alive as long as the program.
class RanTable {
 public:
  static constexpr int kMost = 16;  // parts, and algorithms

  RanTable(const char* op, std::vector<const char*> parts, std::vector<const char*> algorithms)
      : op_(op), parts_(std::move(parts)), algorithms_(std::move(algorithms)) {
    const std::lock_guard<std::mutex> lock(all().mutex);
    all().tables.push_back(this);
  }
  RanTable(const RanTable&) = delete;
  RanTable& operator=(const RanTable&) = delete;

  void add(bool cuda, int part, int algorithm) {
    counts_[cuda][part][algorithm].fetch_add(1, std::memory_order_relaxed);
  }

  // Of all operators; those above zero.
  static std::vector<RanCount> counts() {
    const std::lock_guard<std::mutex> lock(all().mutex);
    std::vector<RanCount> found;
    for (const RanTable* table : all().tables) table->list(found);
    return found;
  }

 private:
  struct All {
    std::mutex mutex;
    std::vector<const RanTable*> tables;
  };
  static All& all() {
    static All all;
    return all;
  }

  void list(std::vector<RanCount>& found) const {
    for (const bool cuda : {false, true}) {
      for (size_t part = 0; part < parts_.size(); ++part) {
        for (size_t a = 0; a < algorithms_.size(); ++a) {
          const int64_t count = counts_[cuda][part][a].load(std::memory_order_relaxed);
          if (count > 0) found.push_back({op_, cuda ? "cuda" : "cpu", parts_[part], algorithms_[a], count});
        }
      }
    }
  }

  const char* op_;
  std::vector<const char*> parts_, algorithms_;
  std::array<std::array<std::array<std::atomic<int64_t>, kMost>, kMost>, 2> counts_{};
};

}  // namespace dlfast
