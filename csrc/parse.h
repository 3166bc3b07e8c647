// The string options of the schemas, read in one place for both devices.
#pragma once

#include <string>

#include "check.h"

namespace cppo {

enum class Scale { kGroup, kBatch, kNone };
enum class Prune { kSmallest, kLargest, kRandom };

inline Scale parse_scale(const char* op, const std::string& scale) {
  if (scale == "group") return Scale::kGroup;
  if (scale == "batch") return Scale::kBatch;
  CPPO_CHECK(scale == "none", op, "scale must be 'group', 'batch' or 'none', got '", scale, "'");
  return Scale::kNone;
}

inline Prune parse_prune(const char* op, const std::string& prune) {
  if (prune == "smallest") return Prune::kSmallest;
  if (prune == "largest") return Prune::kLargest;
  CPPO_CHECK(prune == "random", op, "prune must be 'smallest', 'largest' or 'random', got '",
             prune, "'");
  return Prune::kRandom;
}

inline void check_prune(const char* op, int64_t total, int64_t unit_size, int64_t keep) {
  check_blocks(op, "unit_size", total, unit_size);
  CPPO_CHECK(keep >= 1 && keep <= unit_size, op, "keep must be in [1, unit_size = ", unit_size,
             "], got ", keep);
}

}  // namespace cppo
