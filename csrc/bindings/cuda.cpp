// SPDX-License-Identifier: Apache-2.0
// deepcomm._C.cuda: the owners of the CUDA backend's host layer. Calls of the driver, destructors
// among them, release the GIL: one may wait for a kernel that waits for another rank's thread.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/dlpack.hpp"
#include "bindings/signals.hpp"
#include "host/function.hpp"
#include "host/memory.hpp"
#include "host/physical_memory.hpp"
#include "host/put_off.hpp"
#include "host/symmetric_heap.hpp"
#include "host/wait_word.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

using host::Device;
using host::DeviceMemory;
using host::Driver;
using host::Function;
using host::HostMemory;
using host::PhysicalMemory;
using host::SymmetricHeap;

// NOTE: not with factories (py::init of a function): pybind11 would register what they return in a
// map of the whole process, unguarded. They release the GIL inside.
using NoGil = py::call_guard<py::gil_scoped_release>;
using DevicePointer = std::shared_ptr<Device>;

template <typename T>
T stream_of(uintptr_t address) {
    return reinterpret_cast<T>(address);
}

void bind_driver(py::module_& module) {
    py::class_<Driver, std::shared_ptr<Driver>>(module, "Driver")
        .def(py::init([](const std::string& path) {
                 const py::gil_scoped_release release;
                 return Driver::open(path);
             }),
             py::arg("path") = "libcuda.so.1")
        .def_property_readonly("version", &Driver::version)
        .def_property_readonly("num_devices", &Driver::num_devices)
        .def("attribute", &Driver::attribute, py::arg("device"), py::arg("attribute"))
        .def("device_name", &Driver::device_name, py::arg("device"))
        .def("device_uuid", &Driver::device_uuid, py::arg("device"))
        .def("can_access_peer", &Driver::can_access_peer, py::arg("device"), py::arg("peer"))
        .def("has_context", &Driver::has_context, py::arg("device"));
    py::class_<Device, std::shared_ptr<Device>>(module, "Device")
        .def(py::init([](std::shared_ptr<Driver> driver, int index) {
                 const py::gil_scoped_release release;
                 return Device::open(std::move(driver), index);
             }),
             py::arg("driver"), py::arg("index"))
        .def_property_readonly("index", &Device::index)
        .def_property_readonly("label", &Device::label)
        .def_property_readonly(
            "uuid", [](const Device& self) { return self.driver().device_uuid(self.index()); })
        .def_property_readonly("capability", &Device::capability)
        .def_property_readonly("num_sms",
                               [](const Device& self) { return self.attribute(host::cu::kNumSms); })
        .def_property_readonly(
            "has_posix_fd",
            [](const Device& self) { return (self.handle_types() & host::cu::kPosixFd) != 0; })
        .def_property_readonly(
            "has_fabric",
            [](const Device& self) { return (self.handle_types() & host::cu::kFabric) != 0; })
        .def(
            "make_stream",
            [](const Device& self, int priority) {
                return reinterpret_cast<uintptr_t>(self.make_stream(priority));
            },
            py::arg("priority"), NoGil(), "A non-blocking stream that is never destroyed.");
}

void bind_memory(py::module_& module) {
    const py::release_gil_before_calling_cpp_dtor no_gil_at_end;
    py::class_<DeviceMemory>(module, "DeviceMemory", no_gil_at_end)
        .def(py::init<DevicePointer, int64_t>(), py::arg("device"), py::arg("num_bytes"), NoGil())
        .def_property_readonly("address", &DeviceMemory::address)
        .def_property_readonly("num_bytes", &DeviceMemory::num_bytes)
        .def(
            "fill",
            [](DeviceMemory& self, const py::bytes& content) {
                const auto bytes = static_cast<std::string_view>(content);
                const py::gil_scoped_release release;
                self.copy_from_host(bytes.data(), static_cast<int64_t>(bytes.size()));
            },
            py::arg("content"));
    py::class_<HostMemory>(module, "HostMemory", no_gil_at_end)
        .def(py::init<DevicePointer, int64_t>(), py::arg("device"), py::arg("num_bytes"), NoGil())
        .def_property_readonly(
            "address",
            [](const HostMemory& self) { return reinterpret_cast<uintptr_t>(self.address()); })
        .def_property_readonly("device_address", &HostMemory::device_address)
        .def_property_readonly("num_bytes", &HostMemory::num_bytes);
    py::class_<PhysicalMemory, std::shared_ptr<PhysicalMemory>>(module, "PhysicalMemory",
                                                                no_gil_at_end)
        .def_static("import_fd", &PhysicalMemory::import_fd, py::arg("device"), py::arg("fd"),
                    py::arg("num_bytes"), NoGil())
        .def_static(
            "import_fabric",
            [](const DevicePointer& device, const py::bytes& fabric, int64_t num_bytes) {
                const std::string handle = fabric;
                const py::gil_scoped_release release;
                return PhysicalMemory::import_fabric(device, handle, num_bytes);
            },
            py::arg("device"), py::arg("fabric"), py::arg("num_bytes"))
        .def("export_fd", &PhysicalMemory::export_fd, NoGil(), "A descriptor to close.")
        .def("export_fabric",
             [](const PhysicalMemory& self) { return py::bytes(self.export_fabric()); })
        .def_property_readonly("num_bytes", &PhysicalMemory::num_bytes);
}

py::capsule lease(SymmetricHeap& heap, int64_t generation, int64_t offset, int64_t num_bytes) {
    auto lease = heap.lease(generation, offset, num_bytes);
    auto* const data = reinterpret_cast<void*>(lease->address());
    return lease_capsule(std::move(lease), {kDlCuda, heap.device().index()}, data, kDlByte,
                         {num_bytes});
}

void bind_heap(py::module_& module) {
    py::class_<host::Mapping, std::shared_ptr<host::Mapping>>(
        module, "Mapping", py::release_gil_before_calling_cpp_dtor());
    py::class_<SymmetricHeap>(module, "SymmetricHeap", py::release_gil_before_calling_cpp_dtor())
        .def(py::init<DevicePointer, int64_t>(), py::arg("device"), py::arg("num_bytes"), NoGil())
        .def_property_readonly("memory", &SymmetricHeap::memory)
        .def_property_readonly("mapping", &SymmetricHeap::mapping)
        .def_property_readonly("base", &SymmetricHeap::base)
        .def_property_readonly("num_bytes", &SymmetricHeap::num_bytes)
        .def("map", &SymmetricHeap::map, py::arg("peer").none(false), NoGil())
        .def("join", &SymmetricHeap::join, py::arg("peer").none(false), NoGil())
        .def("lease", &lease, py::arg("generation"), py::arg("offset"), py::arg("num_bytes"),
             "DLPack capsule of bytes of the own block.")
        .def("num_leases", &SymmetricHeap::num_leases, py::arg("generation"))
        .def(
            "close",
            [](SymmetricHeap& self, const std::vector<uintptr_t>& addresses) {
                std::vector<host::cu::Stream> streams;
                for (const uintptr_t address : addresses) {
                    streams.push_back(stream_of<host::cu::Stream>(address));
                }
                self.close(std::move(streams));
            },
            py::arg("streams"), NoGil());
}

void bind_function(py::module_& module) {
    py::class_<Function>(module, "Function", py::release_gil_before_calling_cpp_dtor())
        .def(py::init([](const DevicePointer& device, const py::bytes& cubin,
                         const std::string& symbol, int shared_bytes, int max_threads,
                         bool awaits_ahead) {
                 const host::KernelImage image{cubin, symbol, shared_bytes, max_threads,
                                               awaits_ahead};
                 const py::gil_scoped_release release;
                 return std::make_unique<Function>(device, image);
             }),
             py::arg("device"), py::arg("cubin"), py::arg("symbol"), py::arg("shared_bytes"),
             py::arg("max_threads"), py::arg("awaits_ahead"))
        .def_property_readonly("max_threads", &Function::max_threads)
        .def_property_readonly("blocks_per_sm", &Function::blocks_per_sm)
        .def("spread_over", &Function::spread_over, py::arg("num_sms"), NoGil(),
             "Let early launches take no more than their share of each SM, if these are all.");
    module.def(
        "wait_word",
        [](uintptr_t address, uint64_t expected, uintptr_t record, double timeout_s) {
            return host::wait_word(reinterpret_cast<const uint64_t*>(address), expected,
                                   reinterpret_cast<const layout::ErrorRecord*>(record), timeout_s,
                                   check_signals);
        },
        py::arg("address"), py::arg("expected"), py::arg("record_address"), py::arg("timeout_s"),
        NoGil(), "False once the time is up or the error record is complete.");
}

}  // namespace

void bind_cuda(py::module_& parent) {
    py::module_ module = parent.def_submodule("cuda", "Memory and kernels of GPUs.");
    module.def("free_put_off", &host::free_put_off, NoGil(),
               "Free what its owners could not, since that waits for kernels.");
    module.attr("VIRTUAL_MEMORY_SUPPORTED") = static_cast<int>(host::cu::kVirtualMemorySupported);
    module.attr("POSIX_FD_SUPPORTED") = static_cast<int>(host::cu::kPosixFdSupported);
    module.attr("FABRIC_SUPPORTED") = static_cast<int>(host::cu::kFabricSupported);
    module.attr("RDMA_SUPPORTED") = static_cast<int>(host::cu::kRdmaWithVirtualMemorySupported);
    bind_driver(module);
    bind_memory(module);
    bind_heap(module);
    bind_function(module);
}

}  // namespace deepcomm
