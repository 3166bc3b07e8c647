// Host-side planners: how completions are spread over micro-batches and ranks. No tensor is seen.
// Specification: plan_microbatches and balance_ranks in cppo/reference.py.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace {

using Lengths = std::vector<int64_t>;
using Bins = std::vector<std::vector<int64_t>>;

Lengths longest_first(const Lengths& lengths) {
  Lengths order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  return order;
}

void check_lengths(const std::string& op, const Lengths& lengths) {
  int64_t room = std::numeric_limits<int64_t>::max();
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 0) {
      throw std::invalid_argument("cppo." + op + ": lengths must not be negative, got " +
                                  std::to_string(lengths[i]) + " at index " + std::to_string(i));
    }
    if (lengths[i] > room) {
      throw std::invalid_argument("cppo." + op + ": lengths must add up to less than 2^63, " +
                                  "got more at index " + std::to_string(i));
    }
    room -= lengths[i];
  }
}

// The first bin with room in O(log n): each node holds the largest room below it. All bins exist
// from the start, empty ones after the used ones, so "open a new bin" is the same search.
class FirstFit {
 public:
  FirstFit(size_t bins, int64_t room) {
    while (leaves_ < bins) leaves_ *= 2;
    room_.assign(2 * leaves_, room);
  }

  size_t place(int64_t length) {
    size_t node = 1;
    while (node < leaves_) node = 2 * node + (room_[2 * node] < length);
    const size_t bin = node - leaves_;
    room_[node] -= length;
    for (node /= 2; node > 0; node /= 2) {
      room_[node] = std::max(room_[2 * node], room_[2 * node + 1]);
    }
    return bin;
  }

 private:
  size_t leaves_ = 1;
  Lengths room_;
};

Bins plan_microbatches(const Lengths& lengths, int64_t max_tokens) {
  check_lengths("plan_microbatches", lengths);
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] > max_tokens) {
      throw std::invalid_argument("cppo.plan_microbatches: the completion at index " +
                                  std::to_string(i) + " has " + std::to_string(lengths[i]) +
                                  " tokens, more than max_tokens = " + std::to_string(max_tokens));
    }
  }
  FirstFit fit(lengths.size(), max_tokens);
  Bins bins(lengths.size());
  for (const int64_t i : longest_first(lengths)) bins[fit.place(lengths[i])].push_back(i);
  bins.erase(std::remove_if(bins.begin(), bins.end(), [](const auto& b) { return b.empty(); }),
             bins.end());
  for (auto& bin : bins) std::sort(bin.begin(), bin.end());
  std::sort(bins.begin(), bins.end());
  return bins;
}

Bins balance_ranks(const Lengths& lengths, int64_t world_size) {
  check_lengths("balance_ranks", lengths);
  if (world_size < 1) {
    throw std::invalid_argument("cppo.balance_ranks: world_size must be at least 1, got " +
                                std::to_string(world_size));
  }
  const size_t base = lengths.size() / world_size, extra = lengths.size() % world_size;
  Bins ranks(world_size);
  Lengths totals(world_size, 0);
  size_t larger = 0;  // ranks that already hold one more than `base`
  for (const int64_t i : longest_first(lengths)) {
    int64_t best = -1;
    for (int64_t rank = 0; rank < world_size; ++rank) {
      const size_t count = ranks[rank].size();
      const bool has_room = count < base || (count == base && larger < extra);
      if (has_room && (best < 0 || totals[rank] < totals[best])) best = rank;
    }
    ranks[best].push_back(i);
    totals[best] += lengths[i];
    larger += ranks[best].size() > base;
  }
  for (auto& members : ranks) std::sort(members.begin(), members.end());
  return ranks;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  namespace py = pybind11;
  m.def("plan_microbatches", &plan_microbatches, py::arg("lengths"), py::arg("max_tokens"),
        py::call_guard<py::gil_scoped_release>());
  m.def("balance_ranks", &balance_ranks, py::arg("lengths"), py::arg("world_size"),
        py::call_guard<py::gil_scoped_release>());
}
