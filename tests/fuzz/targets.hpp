// What is fuzzed: every parser of bytes that come from outside the process.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "sluice/base/error.hpp"
#include "sluice/base/log.hpp"

namespace sluice::fuzz {

struct Target {
  std::string name;
  std::function<void(const std::string& input)> run;
  std::vector<std::string> seeds;  // generated, valid inputs
  std::function<void(std::string& input)>
      mend;  // makes checksums and lengths true again, so that what is behind is reached
};

const std::vector<Target>& targets();

}  // namespace sluice::fuzz
