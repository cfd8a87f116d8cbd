// SPDX-License-Identifier: Apache-2.0
// What the host has to know of the structs of the NCCL that the agent was compiled for. It declares none
// of them, for they differ from version to version: it reads these constants from the compiled kernel
// (deepcomm/backends/cuda/gin_facts.py, in this order). NVRTC has no offsetof: of each field that the
// host uses there is a copy of the struct in which that field alone has another value.
#pragma once

#include <nccl_device.h>

#include "common/int.hpp"

namespace deepcomm::kernels {

template <typename Struct, typename Field>
constexpr Struct with(Struct object, Field Struct::* field, Field value) {
    object.*field = value;
    return object;
}

constexpr ncclDevCommRequirements kGinRequirements = NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER;
constexpr ncclCommProperties kGinProperties = NCCL_COMM_PROPERTIES_INITIALIZER;

}  // namespace deepcomm::kernels

extern "C" {

__device__ const uint32_t deepcomm_gin_numbers[] = {
    NCCL_VERSION_CODE,          sizeof(ncclDevComm),      sizeof(ncclDevCommRequirements),
    sizeof(ncclCommProperties), NCCL_GIN_CONNECTION_FULL, NCCL_GIN_CONNECTION_RAIL,
};

__device__ const ncclDevCommRequirements deepcomm_gin_requirements[] = {
    deepcomm::kernels::kGinRequirements,
    deepcomm::kernels::with(deepcomm::kernels::kGinRequirements,
                            &ncclDevCommRequirements::ginContextCount, 1),
    deepcomm::kernels::with(deepcomm::kernels::kGinRequirements,
                            &ncclDevCommRequirements::ginSignalCount, 1),
    deepcomm::kernels::with(deepcomm::kernels::kGinRequirements,
                            &ncclDevCommRequirements::ginCounterCount, 1),
    deepcomm::kernels::with(deepcomm::kernels::kGinRequirements,
                            &ncclDevCommRequirements::ginConnectionType, NCCL_GIN_CONNECTION_FULL),
};

__device__ const ncclCommProperties deepcomm_gin_properties[] = {
    deepcomm::kernels::kGinProperties,
    deepcomm::kernels::with(deepcomm::kernels::kGinProperties, &ncclCommProperties::nRanks, 1),
    deepcomm::kernels::with(deepcomm::kernels::kGinProperties,
                            &ncclCommProperties::deviceApiSupport, true),
    deepcomm::kernels::with(deepcomm::kernels::kGinProperties, &ncclCommProperties::ginType,
                            NCCL_GIN_TYPE_PROXY),
    deepcomm::kernels::with(deepcomm::kernels::kGinProperties, &ncclCommProperties::nLsaTeams, 1),
    deepcomm::kernels::with(deepcomm::kernels::kGinProperties, &ncclCommProperties::railedGinType,
                            NCCL_GIN_TYPE_PROXY),
};

}  // extern "C"
