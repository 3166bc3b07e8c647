// Options of advantages and pruning: how they are read and checked. What they mean: prune_rules.h.
#pragma once

#include <string>

#include "check.h"
#include "prune_rules.h"

namespace cppo {

inline Scale parse_scale(const char* op, const std::string& scale) {
  if (scale == "group") return Scale::kGroup;
  if (scale == "batch") return Scale::kBatch;
  CPPO_CHECK(scale == "none", op, "scale must be 'group', 'batch' or 'none', got '", scale, "'");
  return Scale::kNone;
}

inline Prune parse_prune(const char* op, const std::string& prune) {
  if (prune == "smallest") return Prune::kSmallest;
  if (prune == "largest") return Prune::kLargest;
  if (prune == "score") return Prune::kScore;
  if (prune == "variance") return Prune::kVariance;
  CPPO_CHECK(prune == "unbiased", op,
             "prune must be 'smallest', 'largest', 'score', 'variance' or 'unbiased', got '", prune,
             "'");
  return Prune::kUnbiased;
}

// Whether a rule reads a score beside the advantages: its ranks, the rewards, or chance.
inline bool needs_score(Prune prune) {
  return prune != Prune::kSmallest && prune != Prune::kLargest;
}

inline void check_prune(const char* op, int64_t total, int64_t unit_size, int64_t keep) {
  check_blocks(op, "unit_size", total, unit_size);
  CPPO_CHECK(keep >= 1 && keep <= unit_size, op, "keep must be in [1, unit_size = ", unit_size,
             "], got ", keep);
}

}  // namespace cppo
