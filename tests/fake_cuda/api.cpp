// SPDX-License-Identifier: Apache-2.0
// Compiles only if our declarations of the driver's interface agree with CUDA's own header.
#include "host/cuda_api.hpp"

#include <cuda.h>

namespace {

using namespace deepcomm::host::cu;

template <typename... Theirs, typename... Ours>
constexpr bool agree(CUresult (*)(Theirs...), Result (*)(Ours...)) {
    if constexpr (sizeof...(Theirs) == sizeof...(Ours)) {
        return ((sizeof(Theirs) == sizeof(Ours)) && ...);
    }
    return false;
}

#define CHECK_FUNCTION(name, parameters)                             \
    static_assert(agree(static_cast<decltype(&::name)>(nullptr),     \
                        static_cast<Result(*) parameters>(nullptr)), \
                  #name);
DEEPCOMM_CUDA_FUNCTIONS(CHECK_FUNCTION)
DEEPCOMM_CUDA_OPTIONAL_FUNCTIONS(CHECK_FUNCTION)

#define CHECK_FIELD(ours, our_field, theirs, their_field)                               \
    static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field), #ours ":" \
                                                                                    ":" #our_field)

static_assert(sizeof(AllocationProperties) == sizeof(CUmemAllocationProp));
CHECK_FIELD(AllocationProperties, handle_types, CUmemAllocationProp, requestedHandleTypes);
CHECK_FIELD(AllocationProperties, location, CUmemAllocationProp, location);
CHECK_FIELD(AllocationProperties, flags, CUmemAllocationProp, allocFlags);
CHECK_FIELD(AllocationProperties, flags.gpu_direct_rdma_capable, CUmemAllocationProp,
            allocFlags.gpuDirectRDMACapable);

static_assert(sizeof(Location) == sizeof(CUmemLocation));
CHECK_FIELD(Location, id, CUmemLocation, id);

static_assert(sizeof(AccessDescription) == sizeof(CUmemAccessDesc));
CHECK_FIELD(AccessDescription, flags, CUmemAccessDesc, flags);

static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
CHECK_FIELD(LaunchConfig, block, CUlaunchConfig, blockDimX);
CHECK_FIELD(LaunchConfig, shared_bytes, CUlaunchConfig, sharedMemBytes);
CHECK_FIELD(LaunchConfig, stream, CUlaunchConfig, hStream);
CHECK_FIELD(LaunchConfig, attributes, CUlaunchConfig, attrs);
CHECK_FIELD(LaunchConfig, num_attributes, CUlaunchConfig, numAttrs);

static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
CHECK_FIELD(LaunchAttribute, id, CUlaunchAttribute, id);
CHECK_FIELD(LaunchAttribute, value, CUlaunchAttribute,
            value.programmaticStreamSerializationAllowed);

static_assert(sizeof(Uuid) == sizeof(CUuuid));
static_assert(sizeof(FabricHandle) == sizeof(CUmemFabricHandle));

#define CHECK_VALUE(ours, theirs) \
    static_assert(static_cast<int>(ours) == static_cast<int>(theirs), #theirs)
CHECK_VALUE(kSuccess, CUDA_SUCCESS);
CHECK_VALUE(kOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
CHECK_VALUE(kDeinitialized, CUDA_ERROR_DEINITIALIZED);
CHECK_VALUE(kLegacyStream, CU_GET_PROC_ADDRESS_LEGACY_STREAM);
CHECK_VALUE(kNumSms, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
CHECK_VALUE(kSmSharedBytes, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
CHECK_VALUE(kReservedSharedBytes, CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK);
CHECK_VALUE(kCapabilityMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
CHECK_VALUE(kCapabilityMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
CHECK_VALUE(kVirtualMemorySupported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
CHECK_VALUE(kPosixFdSupported, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
CHECK_VALUE(kRdmaWithVirtualMemorySupported,
            CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);
CHECK_VALUE(kFabricSupported, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED);
CHECK_VALUE(kMaxThreadsPerBlock, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
CHECK_VALUE(kStaticSharedBytes, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
CHECK_VALUE(kMaxDynamicSharedBytes, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
CHECK_VALUE(kProgrammaticStreamSerialization,
            CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
CHECK_VALUE(kPinned, CU_MEM_ALLOCATION_TYPE_PINNED);
CHECK_VALUE(kOnDevice, CU_MEM_LOCATION_TYPE_DEVICE);
CHECK_VALUE(kReadWrite, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
CHECK_VALUE(kMinimumGranularity, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
CHECK_VALUE(kPosixFd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
CHECK_VALUE(kFabric, CU_MEM_HANDLE_TYPE_FABRIC);
CHECK_VALUE(kHostPortable, CU_MEMHOSTALLOC_PORTABLE);
CHECK_VALUE(kHostDeviceMap, CU_MEMHOSTALLOC_DEVICEMAP);
CHECK_VALUE(kNonBlocking, CU_STREAM_NON_BLOCKING);

}  // namespace
