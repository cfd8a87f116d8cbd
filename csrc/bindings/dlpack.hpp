// SPDX-License-Identifier: Apache-2.0
// Leased bytes of symmetric memory as a DLPack capsule: the storage's deleter ends the lease. The
// structures are DLPack's public C ABI, version 0.8 (dlpack.h), as far as bytes need it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

namespace deepcomm {

struct DlDevice {
    int32_t device_type;
    int32_t device_id;
};

struct DlDataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct DlTensor {
    void* data;
    DlDevice device;
    int32_t ndim;
    DlDataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct DlManagedTensor {
    DlTensor tensor;
    void* manager_ctx;
    void (*deleter)(DlManagedTensor*);
};

constexpr int32_t kDlCpu = 1;
constexpr int32_t kDlCuda = 2;

/// One lease and the tensor that stands for it. The lease ends with the last storage.
template <typename Lease>
struct LeasedBytes {
    DlManagedTensor managed{};
    int64_t shape = 0;
    Lease lease;

    explicit LeasedBytes(Lease held) : lease(std::move(held)) {}

    static void end(DlManagedTensor* managed) {
        delete static_cast<LeasedBytes*>(managed->manager_ctx);
    }
};

/// Returns num_bytes bytes at data as a capsule that keeps lease until its storage is freed.
template <typename Lease>
pybind11::capsule lease_capsule(Lease lease, DlDevice device, void* data, int64_t num_bytes) {
    constexpr uint8_t kUint = 1;
    auto* const leased = new LeasedBytes<Lease>(std::move(lease));
    leased->shape = num_bytes;
    leased->managed.tensor.data = data;
    leased->managed.tensor.device = device;
    leased->managed.tensor.ndim = 1;
    leased->managed.tensor.dtype = {kUint, 8, 1};
    leased->managed.tensor.shape = &leased->shape;
    leased->managed.manager_ctx = leased;
    leased->managed.deleter = &LeasedBytes<Lease>::end;
    return pybind11::capsule(&leased->managed, "dltensor", [](PyObject* object) {
        // A consumer renames the capsule and owns the tensor from then on.
        if (PyCapsule_IsValid(object, "dltensor") != 0) {
            auto* const managed =
                static_cast<DlManagedTensor*>(PyCapsule_GetPointer(object, "dltensor"));
            managed->deleter(managed);
        }
    });
}

}  // namespace deepcomm
