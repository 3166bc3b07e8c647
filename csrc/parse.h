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

enum class Importance { kToken, kSequence };
enum class Reduction { kGrpo, kDapo, kDrGrpo };
enum class Divergence { kK3, kK1, kFull };
enum class CplReduction { kToken, kSequence };

inline Importance parse_importance(const char* op, const std::string& importance) {
  if (importance == "token") return Importance::kToken;
  CPPO_CHECK(importance == "sequence", op, "importance must be 'token' or 'sequence', got '",
             importance, "'");
  return Importance::kSequence;
}

inline Reduction parse_reduction(const char* op, const std::string& reduction) {
  if (reduction == "grpo") return Reduction::kGrpo;
  if (reduction == "dapo") return Reduction::kDapo;
  CPPO_CHECK(reduction == "dr_grpo", op, "reduction must be 'grpo', 'dapo' or 'dr_grpo', got '",
             reduction, "'");
  return Reduction::kDrGrpo;
}

inline Divergence parse_divergence(const char* op, const std::string& divergence) {
  if (divergence == "k3") return Divergence::kK3;
  if (divergence == "k1") return Divergence::kK1;
  CPPO_CHECK(divergence == "full", op, "divergence must be 'k3', 'k1' or 'full', got '",
             divergence, "'");
  return Divergence::kFull;
}

inline CplReduction parse_cpl_reduction(const char* op, const std::string& reduction) {
  if (reduction == "token") return CplReduction::kToken;
  CPPO_CHECK(reduction == "sequence", op, "cpl_reduction must be 'token' or 'sequence', got '",
             reduction, "'");
  return CplReduction::kSequence;
}

inline void check_prune(const char* op, int64_t total, int64_t unit_size, int64_t keep) {
  check_blocks(op, "unit_size", total, unit_size);
  CPPO_CHECK(keep >= 1 && keep <= unit_size, op, "keep must be in [1, unit_size = ", unit_size,
             "], got ", keep);
}

}  // namespace cppo
