// SPDX-License-Identifier: Apache-2.0
// The part of NCCL's interface that the host layer calls: types, constants and the table of
// functions, declared from its public documentation. The extension is built without NCCL's header;
// where it is installed, a test compares the two.
#pragma once

#include <climits>
#include <cstddef>

#include "host/cuda_api.hpp"

namespace deepcomm::host::nccl {

using Result = int;  // an enum of C
using Comm = struct CommObject*;
using Window = struct WindowObject*;

constexpr Result kSuccess = 0;
constexpr Result kRemoteError = 6;  ///< the network failed, or a peer's process ended
constexpr Result kInProgress = 7;   ///< no error: the library goes on in a thread of its own

/// Versions are 10000 * major + 100 * minor + patch.
constexpr int kOldestVersion = 21900;
constexpr int kNextSeries = 30000;
constexpr int kTrafficClassVersion = 22600;
constexpr int kDeviceApiVersion = 23004;  ///< the oldest whose GIN does what rails ask of it

constexpr int kUint8 = 1;            ///< ncclDataType_t
constexpr int kSymmetricWindow = 1;  ///< NCCL_WIN_COLL_SYMMETRIC
constexpr int kUndefined = INT_MIN;

struct UniqueId {
    char bytes[128];
};

/// The fields up to the last that we set. A library copies the bytes that both it and `size` have,
/// and takes its defaults for all fields that came later than `version`.
struct Config {
    size_t size = sizeof(Config);
    unsigned magic = 0xcafebeef;
    unsigned version = kTrafficClassVersion;
    int blocking = kUndefined;
    int cga_cluster_size = kUndefined;
    int min_ctas = kUndefined;
    int max_ctas = kUndefined;
    const char* net_name = nullptr;
    int split_share = kUndefined;
    int traffic_class = kUndefined;
};

// X(result, name, parameters)
#define DEEPCOMM_NCCL_FUNCTIONS(X)                                                        \
    X(Result, ncclGetVersion, (int* version))                                             \
    X(const char*, ncclGetErrorString, (Result error))                                    \
    X(const char*, ncclGetLastError, (Comm comm))                                         \
    X(Result, ncclGetUniqueId, (UniqueId * id))                                           \
    X(Result, ncclCommInitRankConfig,                                                     \
      (Comm * comm, int num_ranks, UniqueId id, int rank, Config* config))                \
    X(Result, ncclCommGetAsyncError, (Comm comm, Result * error))                         \
    X(Result, ncclCommFinalize, (Comm comm))                                              \
    X(Result, ncclCommDestroy, (Comm comm))                                               \
    X(Result, ncclCommAbort, (Comm comm))                                                 \
    X(Result, ncclGroupStart, ())                                                         \
    X(Result, ncclGroupEnd, ())                                                           \
    X(Result, ncclSend,                                                                   \
      (const void* from, size_t count, int type, int peer, Comm comm, cu::Stream stream)) \
    X(Result, ncclRecv, (void* to, size_t count, int type, int peer, Comm comm, cu::Stream stream))

// What newer libraries have; null where this one has not. Structs of the device API differ from version
// to version: they are bytes here, and opaque handles.
#define DEEPCOMM_NCCL_OPTIONAL_FUNCTIONS(X)                                             \
    X(Result, ncclCommWindowRegister,                                                   \
      (Comm comm, void* address, size_t num_bytes, Window* window, int flags))          \
    X(Result, ncclCommWindowDeregister, (Comm comm, Window window))                     \
    X(Result, ncclCommQueryProperties, (Comm comm, void* properties))                   \
    X(Result, ncclDevCommCreate, (Comm comm, const void* requirements, void* dev_comm)) \
    X(Result, ncclDevCommDestroy, (Comm comm, const void* dev_comm))

struct Api {
#define DEEPCOMM_NCCL_MEMBER(result, name, parameters) result(*name) parameters = nullptr;
    DEEPCOMM_NCCL_FUNCTIONS(DEEPCOMM_NCCL_MEMBER)
    DEEPCOMM_NCCL_OPTIONAL_FUNCTIONS(DEEPCOMM_NCCL_MEMBER)
#undef DEEPCOMM_NCCL_MEMBER
};

}  // namespace deepcomm::host::nccl
