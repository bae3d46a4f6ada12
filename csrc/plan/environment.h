// Switches from the environment: a value that is not understood is an error, never ignored.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace pgdfast {

// The number that a variable holds, or `otherwise` where it is not set. Raises std::invalid_argument for anything else.
inline index number_from_environment(const char* name, index otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (*text == '\0' || *end != '\0' || value < 0)
    throw std::invalid_argument(std::string("pgdfast: ") + name + " is '" + text + "'; it must be a number that is not negative.");
  return index(value);
}

// The complaint about a switch that must be one of some words.
inline std::invalid_argument unknown_switch(const char* name, const char* value, const std::string& known) {
  return std::invalid_argument(std::string("pgdfast: ") + name + " is '" + value + "'; it must be one of " + known + ".");
}

}  // namespace pgdfast
