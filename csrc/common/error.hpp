// SPDX-License-Identifier: Apache-2.0
// The exceptions of the host code, one for each class of deepcomm/errors.py, and the checks that
// throw them. The function that first knows an error formats it: argument, expected, got.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace deepcomm {

class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

class InvalidArgument : public Error {
  public:
    using Error::Error;
};

class ConfigMismatch : public Error {
  public:
    using Error::Error;
};

class InternalError : public Error {
  public:
    using Error::Error;
};

/// A call of CUDA's driver failed: the call, the code and its name.
class CudaError : public Error {
  public:
    using Error::Error;
};

/// A call of NCCL failed: the call, the code and its name.
class NcclError : public Error {
  public:
    using Error::Error;
};

/// A peer failed or refused; peer is -1 where no single one is at fault.
class CommError : public Error {
  public:
    CommError(const std::string& message, int peer) : Error(message), peer(peer) {}
    int peer;
};

/// A peer died, closed or failed: unlike a peer's argument error, the buffer can only be closed.
class PeerLost : public CommError {
  public:
    using CommError::CommError;
};

/// A peer did not arrive before the deadline.
class CommTimeout : public CommError {
  public:
    using CommError::CommError;
};

/// Whether the operation can end on all ranks and the next one start: everything but a lost peer and
/// our own bugs.
inline bool is_recoverable(const Error& error) {
    return dynamic_cast<const PeerLost*>(&error) == nullptr &&
           dynamic_cast<const CommTimeout*>(&error) == nullptr &&
           dynamic_cast<const InternalError*>(&error) == nullptr;
}

__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
    std::va_list args;
    va_start(args, pattern);
    std::va_list again;
    va_copy(again, args);
    const int size = std::vsnprintf(nullptr, 0, pattern, args);
    va_end(args);
    std::string text(static_cast<size_t>(size), '\0');
    std::vsnprintf(text.data(), text.size() + 1, pattern, again);
    va_end(again);
    return text;
}

}  // namespace deepcomm

/// The user's mistake: throws InvalidArgument with a formatted message.
#define DEEPCOMM_CHECK_ARG(condition, ...)                                      \
    do {                                                                        \
        if (!(condition)) {                                                     \
            throw ::deepcomm::InvalidArgument(::deepcomm::format(__VA_ARGS__)); \
        }                                                                       \
    } while (false)

/// Our mistake: throws InternalError with the place and a formatted message.
#define DEEPCOMM_ASSERT(condition, ...)                                                         \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            throw ::deepcomm::InternalError(::deepcomm::format("%s:%d: ", __FILE__, __LINE__) + \
                                            ::deepcomm::format(__VA_ARGS__));                   \
        }                                                                                       \
    } while (false)
