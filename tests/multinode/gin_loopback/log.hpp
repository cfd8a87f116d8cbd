// SPDX-License-Identifier: Apache-2.0
// Settings, and what a person debugging it sees: DEEPCOMM_LOOPBACK_LOG=1 writes the calls that
// prepare and end something to stderr, =2 every operation as well. Failures are always written.
#pragma once

#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace loopback {

inline long setting(const char* name, long usual) {
    const char* const text = std::getenv(name);
    return text == nullptr ? usual : std::strtol(text, nullptr, 10);
}

inline std::string text_setting(const char* name, const char* usual) {
    const char* const text = std::getenv(name);
    return text == nullptr ? usual : text;
}

enum LogLevel : long { kFailures = 0, kCalls = 1, kOperations = 2 };

__attribute__((format(printf, 2, 3))) inline void log(LogLevel level, const char* format, ...) {
    static const long wanted = setting("DEEPCOMM_LOOPBACK_LOG", kFailures);
    if (level > wanted) {
        return;
    }
    char line[512];
    va_list values;
    va_start(values, format);
    std::vsnprintf(line, sizeof(line), format, values);
    va_end(values);
    std::fprintf(stderr, "loopback[%d] %s\n", static_cast<int>(getpid()), line);
}

}  // namespace loopback
