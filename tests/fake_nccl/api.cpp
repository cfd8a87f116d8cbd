// SPDX-License-Identifier: Apache-2.0
// Compiles only if our declarations of NCCL's interface agree with its own header.
#include <type_traits>

#include "host/nccl_api.hpp"

#include <nccl.h>
#include <nccl_device/host.h>

namespace {

namespace ours = deepcomm::host::nccl;

template <typename TheirResult, typename... Theirs, typename OurResult, typename... Ours>
constexpr bool agree(TheirResult (*)(Theirs...), OurResult (*)(Ours...)) {
    if constexpr (sizeof...(Theirs) == sizeof...(Ours)) {
        return sizeof(TheirResult) == sizeof(OurResult) &&
               ((sizeof(Theirs) == sizeof(Ours) &&
                 std::is_class_v<Theirs> == std::is_class_v<Ours>) &&
                ...);
    }
    return false;
}

using ours::Comm;
using ours::Config;
using ours::Result;
using ours::UniqueId;
using ours::Window;
namespace cu = deepcomm::host::cu;

#define CHECK_FUNCTION(result, name, parameters)                     \
    static_assert(agree(static_cast<decltype(&::name)>(nullptr),     \
                        static_cast<result(*) parameters>(nullptr)), \
                  #name);
DEEPCOMM_NCCL_FUNCTIONS(CHECK_FUNCTION)
DEEPCOMM_NCCL_OPTIONAL_FUNCTIONS(CHECK_FUNCTION)

#define CHECK_FIELD(our_field, their_field)                                           \
    static_assert(offsetof(Config, our_field) == offsetof(ncclConfig_t, their_field), \
                  "Config::" #our_field)
CHECK_FIELD(size, size);
CHECK_FIELD(magic, magic);
CHECK_FIELD(version, version);
CHECK_FIELD(blocking, blocking);
CHECK_FIELD(cga_cluster_size, cgaClusterSize);
CHECK_FIELD(min_ctas, minCTAs);
CHECK_FIELD(max_ctas, maxCTAs);
CHECK_FIELD(net_name, netName);
CHECK_FIELD(split_share, splitShare);
CHECK_FIELD(traffic_class, trafficClass);
static_assert(sizeof(Config) == offsetof(ncclConfig_t, commName), "Config");
static_assert(Config{}.magic == NCCL_API_MAGIC, "NCCL_API_MAGIC");
static_assert(sizeof(UniqueId) == sizeof(ncclUniqueId), "ncclUniqueId");

#define CHECK_VALUE(ours, theirs) \
    static_assert(static_cast<int>(ours) == static_cast<int>(theirs), #theirs)
CHECK_VALUE(ours::kSuccess, ncclSuccess);
CHECK_VALUE(ours::kRemoteError, ncclRemoteError);
CHECK_VALUE(ours::kInProgress, ncclInProgress);
CHECK_VALUE(ours::kUint8, ncclUint8);
CHECK_VALUE(ours::kSymmetricWindow, NCCL_WIN_COLL_SYMMETRIC);
CHECK_VALUE(ours::kUndefined, NCCL_CONFIG_UNDEF_INT);
CHECK_VALUE(NCCL_VERSION_CODE, 10000 * NCCL_MAJOR + 100 * NCCL_MINOR + NCCL_PATCH);

}  // namespace
