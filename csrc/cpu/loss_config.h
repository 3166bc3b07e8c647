// The fields of cppo.LossConfig that the terms of the loss depend on, read from its text
// (`LossConfig.text`): "temperature=1.0 clip_low=0.2 dual_clip=None ...".
#pragma once

#include <charconv>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "check.h"

namespace cppo::cpu {

class ConfigText {
 public:
  ConfigText(const char* op, std::string_view text) : op_(op), text_(text) {}

  double number(std::string_view name) const {
    const std::string_view value = of(name);
    double number = 0.0;
    const auto [end, error] = std::from_chars(value.begin(), value.end(), number);
    CPPO_CHECK(error == std::errc() && end == value.end(), op_, "config: ", name,
               " must be a number, got '", value, "'");
    return number;
  }

  std::optional<double> optional_number(std::string_view name) const {
    if (of(name) == "None") return std::nullopt;
    return number(name);
  }

  bool flag(std::string_view name) const {
    return choice<bool>(name, {{"True", true}, {"False", false}});
  }

  template <class T>
  T choice(std::string_view name,
           std::initializer_list<std::pair<std::string_view, T>> choices) const {
    const std::string_view value = of(name);
    std::string known;
    for (const auto& [word, choice] : choices) {
      if (word == value) return choice;
      known += (known.empty() ? "'" : ", '") + std::string(word) + "'";
    }
    fail("cppo.", op_, ": config: ", name, " must be one of ", known, ", got '", value, "'");
  }

 private:
  // What follows "name=", up to the next space.
  std::string_view of(std::string_view name) const {
    for (size_t at = text_.find(name); at != text_.npos; at = text_.find(name, at + 1)) {
      const size_t equals = at + name.size();
      const bool begins = at == 0 || text_[at - 1] == ' ';
      if (!begins || equals == text_.size() || text_[equals] != '=') continue;
      const std::string_view rest = text_.substr(equals + 1);
      return rest.substr(0, rest.find(' '));
    }
    fail("cppo.", op_, ": config must be the text of a LossConfig, ", name, " is not in '", text_,
         "'");
  }

  const char* op_;
  std::string_view text_;
};

enum class Divergence { kK3, kK1, kFull };

struct LossConfig {
  double clip_low, clip_high;
  std::optional<double> dual_clip;
  bool sequence_importance, mean_of_tokens;  // "sequence"; "grpo"
  double kl_coef;
  std::optional<double> kl_clamp;
  double entropy_coef, papo_coef, cpl_coef;
  Divergence divergence;
  double tau;
  bool detach_anchor, mean_of_selected;  // the latter: "sequence"

  explicit LossConfig(const ConfigText& text)
      : clip_low(text.number("clip_low")),
        clip_high(text.number("clip_high")),
        dual_clip(text.optional_number("dual_clip")),
        sequence_importance(
            text.choice<bool>("importance", {{"token", false}, {"sequence", true}})),
        mean_of_tokens(text.choice<bool>(
            "reduction", {{"grpo", true}, {"dapo", false}, {"dr_grpo", false}})),
        kl_coef(text.number("kl_coef")),
        kl_clamp(text.optional_number("kl_clamp")),
        entropy_coef(text.number("entropy_coef")),
        papo_coef(text.number("papo_coef")),
        cpl_coef(text.number("cpl_coef")),
        divergence(text.choice<Divergence>("divergence", {{"k3", Divergence::kK3},
                                                          {"k1", Divergence::kK1},
                                                          {"full", Divergence::kFull}})),
        tau(text.number("tau")),
        detach_anchor(text.flag("detach_anchor")),
        mean_of_selected(
            text.choice<bool>("cpl_reduction", {{"token", false}, {"sequence", true}})) {}
};

}  // namespace cppo::cpu
