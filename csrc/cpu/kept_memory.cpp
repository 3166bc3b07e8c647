// Memory of what is as large as logits: see kept_memory.h.

#include "kept_memory.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include "ops.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>
#endif

namespace cppo::cpu {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;

namespace {
const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

void check_bytes(int64_t bytes) {
  CPPO_CHECK(bytes >= 0, "kept_memory", "bytes must not be negative, got ", bytes);
}
}

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)
namespace {

constexpr size_t kPage = 2u << 20;   // a huge page
constexpr size_t kLeast = 4u << 20;  // what the C library keeps by itself

struct Block {
  char* data;
  size_t bytes;
};

// Whole huge pages from the system, or null. With pages of 4 KiB most of the time to write them would
// go into page faults.
Block map(size_t bytes) {
  void* found =
      mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return {nullptr, 0};
  char* begin = static_cast<char*>(found);
  const size_t before = -reinterpret_cast<uintptr_t>(begin) % kPage;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + bytes, kPage - before);
  madvise(begin + before, bytes, MADV_HUGEPAGE);
  return {begin + before, bytes};
}

class Cache {
 public:
  // Never destroyed: tensors may outlive everything else.
  static Cache& instance() {
    static Cache* const cache = new Cache;
    return *cache;
  }

  // Null where the system has none.
  void* take(size_t bytes) {
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    const std::lock_guard<std::mutex> lock(mutex_);
    Block block = best_idle(size);
    if (block.data == nullptr) block = map(size);
    if (block.data == nullptr) {
      keep_at_most(0);
      block = map(size);
    }
    if (block.data == nullptr) return nullptr;
    in_use_.emplace(block.data, block.bytes);
    bytes_in_use_ += block.bytes;
    most_in_use_ = std::max(most_in_use_, bytes_in_use_);
    // What other sizes left behind makes room.
    keep_at_most(most_in_use_ - bytes_in_use_);
    return block.data;
  }

  void give_back(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = in_use_.find(data);
    const Block block = {static_cast<char*>(data), found->second};
    in_use_.erase(found);
    bytes_in_use_ -= block.bytes;
    // Until the system takes a page it stays as it is, and who writes to it keeps it. Where a system
    // cannot be told, it has the memory back now.
    if (madvise(block.data, block.bytes, MADV_FREE) != 0) {
      munmap(block.data, block.bytes);
      return;
    }
    idle_.push_back(block);
    bytes_idle_ += block.bytes;
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    keep_at_most(0);
    most_in_use_ = bytes_in_use_;
  }

 private:
  Cache() {
    // A child process must not find the lock held by a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  // The smallest kept block that holds `bytes` and is at most a quarter larger.
  Block best_idle(size_t bytes) {
    size_t best = idle_.size();
    for (size_t i = 0; i < idle_.size(); ++i) {
      if (idle_[i].bytes < bytes || idle_[i].bytes > bytes + bytes / 4) continue;
      if (best == idle_.size() || idle_[i].bytes < idle_[best].bytes) best = i;
    }
    if (best == idle_.size()) return {nullptr, 0};
    return remove(best);
  }

  // The oldest go first.
  void keep_at_most(size_t bytes) {
    while (bytes_idle_ > bytes) {
      const Block block = remove(0);
      munmap(block.data, block.bytes);
    }
  }

  Block remove(size_t i) {
    const Block block = idle_[i];
    idle_.erase(idle_.begin() + static_cast<ptrdiff_t>(i));
    bytes_idle_ -= block.bytes;
    return block;
  }

  std::mutex mutex_;
  std::vector<Block> idle_;  // the oldest first
  std::unordered_map<void*, size_t> in_use_;
  size_t bytes_idle_ = 0, bytes_in_use_ = 0, most_in_use_ = 0;
};

// Dense on the CPU, or nothing where it is small or the system has no more.
std::optional<Tensor> of_kept_memory(IntHeaderOnlyArrayRef sizes, ScalarType dtype, size_t bytes) {
  void* data = bytes < kLeast ? nullptr : Cache::instance().take(bytes);
  if (data == nullptr) return std::nullopt;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return torch::stable::from_blob(data, sizes, strides, kCpu, dtype,
                                  [](void* freed) { Cache::instance().give_back(freed); });
}

}  // namespace

Tensor new_gradient(const Tensor& like) {
  const size_t bytes = static_cast<size_t>(like.numel()) * like.element_size();
  const auto kept = of_kept_memory(like.sizes(), like.scalar_type(), bytes);
  return kept ? *kept : torch::stable::new_empty(like, like.sizes(), like.scalar_type());
}

Tensor kept_memory(int64_t bytes) {
  check_bytes(bytes);
  const auto kept = of_kept_memory({bytes}, ScalarType::Byte, static_cast<size_t>(bytes));
  return kept ? *kept : torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, kCpu);
}

void empty_cache() { Cache::instance().clear(); }

#else

Tensor new_gradient(const Tensor& like) {
  return torch::stable::new_empty(like, like.sizes(), like.scalar_type());
}

Tensor kept_memory(int64_t bytes) {
  check_bytes(bytes);
  return torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, kCpu);
}

void empty_cache() {}

#endif

}  // namespace cppo::cpu
