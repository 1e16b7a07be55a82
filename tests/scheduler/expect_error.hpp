// Expectations about errors: the code, and words that the message must contain.
#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>
#include <string_view>

#include "sluice/base/error.hpp"

namespace sluice {

template <typename Call>
void expect_error(ErrorCode code, std::initializer_list<std::string_view> words, Call&& call) {
  try {
    call();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    for (const std::string_view word : words)
      EXPECT_NE(e.message().find(word), std::string::npos) << "no '" << word << "' in: " << e.what();
    return;
  }
  ADD_FAILURE() << "no error was raised";
}

}  // namespace sluice
