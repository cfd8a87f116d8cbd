// SPDX-License-Identifier: Apache-2.0
#include "bindings/plans.hpp"

#include <stdexcept>
#include <utility>

#include "bindings/torch_tensor.hpp"

namespace py = pybind11;

namespace deepcomm {
namespace {

constexpr char kNone = 0;
constexpr char kTensor = 1;
constexpr char kObject = 0;
constexpr char kText = 1;

template <typename T>
void append(std::string& key, const T* values, size_t count) {
    key.append(reinterpret_cast<const char*>(values), count * sizeof *values);
}

template <typename T>
void append(std::string& key, const T& value) {
    append(key, &value, 1);
}

void append_all(std::string& key, const py::tuple& numbers) {
    append(key, numbers.size());
    for (const py::handle number : numbers) {
        append(key, number.cast<int64_t>());
    }
}

/// For a torch without the C function; returns where the tensor begins.
uintptr_t append_by_asking(std::string& key, py::handle tensor) {
    append(key, tensor.attr("get_device")().cast<int64_t>());
    append(key, tensor.attr("dtype").ptr());  // torch has one object for each
    append_all(key, tensor.attr("shape"));
    append_all(key, tensor.attr("stride")());
    return tensor.attr("data_ptr")().cast<uintptr_t>();
}

struct Kind {
    DlDevice device;
    int32_t ndim;
    DlDataType dtype;
};
static_assert(sizeof(Kind) == sizeof(DlDevice) + sizeof(int32_t) + sizeof(DlDataType));

/// Types of less than a byte look like bytes here; no operation takes either.
uintptr_t append_description(std::string& key, py::handle object) {
    const DlTensor tensor = describe_tensor(object);
    append(key, Kind{tensor.device, tensor.ndim, tensor.dtype});
    append(key, tensor.shape, static_cast<size_t>(tensor.ndim));
    append(key, tensor.strides, static_cast<size_t>(tensor.ndim));
    return reinterpret_cast<uintptr_t>(tensor.data);
}

/// One tensor's part of a key tells where the next one's begins. Returns its address, 0 for None, and
/// never 0 for an empty tensor.
uintptr_t append_tensor(std::string& key, py::handle object) {
    if (object.is_none()) {
        key.push_back(kNone);
        return 0;
    }
    key.push_back(kTensor);
    const uintptr_t address =
        can_describe_tensors() ? append_description(key, object) : append_by_asking(key, object);
    key.push_back(static_cast<char>(address % Plans::kAlign));
    return address == 0 ? 1 : address;
}

/// What is kept keeps its options, so that no other object can come to lie where one of them does.
void append_option(std::string& key, py::handle option) {
    Py_ssize_t num_bytes = 0;
    const char* const text = PyUnicode_CheckExact(option.ptr())
                                 ? PyUnicode_AsUTF8AndSize(option.ptr(), &num_bytes)
                                 : nullptr;
    if (text == nullptr) {
        PyErr_Clear();  // of a text that has no UTF-8
        key.push_back(kObject);
        append(key, option.ptr());
        return;
    }
    key.push_back(kText);
    append(key, num_bytes);
    key.append(text, static_cast<size_t>(num_bytes));
}

/// Whether that is raised where something is no tensor, which the checks say in words.
bool is_of_wrong_type(const py::error_already_set& error) {
    return error.matches(PyExc_AttributeError) || error.matches(PyExc_TypeError) ||
           error.matches(PyExc_RuntimeError);
}

}  // namespace

bool Plans::describe(const Call& call) {
    if (call.inputs.size() > kMostInputs) {
        throw py::index_error("inputs: expected fewer");
    }
    key_.clear();
    addresses_ = {};
    try {
        size_t input = 0;
        for (PyObject* const tensor : call.inputs) {
            addresses_[input++] = append_tensor(key_, tensor);
        }
        for (PyObject* const tensor : call.others) {
            append_tensor(key_, tensor);
        }
    } catch (const py::error_already_set& error) {
        if (!is_of_wrong_type(error)) {
            throw;
        }
        return false;
    } catch (const std::runtime_error&) {
        return false;  // a tensor without memory
    }
    for (PyObject* const option : call.options) {
        append_option(key_, option);
    }
    return true;
}

AnyObject Plans::find(const Call& call) {
    if (!describe(call)) {
        return AnyObject(py::none());
    }
    const auto found = plans_.find(key_);
    if (found == plans_.end()) {
        return AnyObject(py::none());
    }
    const Kept& kept = found->second;
    kept.fill(addresses_);
    return AnyObject(py::object(kept.plan));
}

void Plans::keep(py::object plan, Fill fill, const Call& call) {
    if (!describe(call)) {
        return;
    }
    if (plans_.size() >= most_) {
        plans_.clear();
    }
    std::vector<py::object> options;
    for (PyObject* const option : call.options) {
        options.push_back(py::reinterpret_borrow<py::object>(option));
    }
    plans_.insert_or_assign(key_, Kept{std::move(plan), std::move(fill), std::move(options)});
}

}  // namespace deepcomm
