// Functions of C++ as functions of a Python module. Only CPython's limited API is used, so that one binary
// serves every Python: setup.py says from which on.
//
// The parameters of a function of C++ say how its arguments are read. An address is an int. Rows, DeviceRows,
// Features, MatrixRows, a Matrix and a Stream are tuples of their members. The members of Triplets, Factors
// and OnlineStates are arguments of their own. Ids are two: an address and a number. They are copied here, so
// no kernel sees the memory of labels. What does not fit raises TypeError.
#pragma once

#include <Python.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "fisher_cpu.h"
#include "losses_cpu.h"
#include "triplet_cpu.h"

namespace loku {

// Thrown where CPython has an exception set.
struct PythonError {};

// The arguments of a call, or the items of a tuple among them. Each is read once, from the first to the last.
class Arguments {
 public:
  Arguments(PyObject* const* items, Py_ssize_t count) : items_(items), count_(count) {}

  template <typename T>
  T read() {
    if constexpr (std::is_pointer<T>::value) {
      return reinterpret_cast<T>(read<uintptr_t>());
    } else if constexpr (std::is_enum<T>::value) {
      return static_cast<T>(read<std::underlying_type_t<T>>());
    } else if constexpr (std::is_same<T, bool>::value) {
      PyObject* object = next();
      if (object != Py_True && object != Py_False) refuse("a bool was expected");
      return object == Py_True;
    } else if constexpr (std::is_floating_point<T>::value) {
      return static_cast<T>(checked(PyFloat_AsDouble(next())));
    } else if constexpr (std::is_unsigned<T>::value) {
      return narrowed<T>(checked(PyLong_AsUnsignedLongLong(next())));
    } else {
      static_assert(std::is_integral<T>::value, "a specialisation says how a struct is read");
      return narrowed<T>(checked(PyLong_AsLongLong(next())));
    }
  }

  // A tuple of the members of T.
  template <typename T, typename... Members>
  T read_tuple() {
    PyObject* tuple = next();
    if (!PyTuple_Check(tuple)) refuse("a tuple was expected");
    Arguments items(tuple, PyTuple_Size(tuple));
    const T value{items.read<Members>()...};  // braces: from the first to the last
    items.finish();
    return value;
  }

  void finish() const {
    if (next_ != count_) refuse("there are too many arguments");
  }

 private:
  Arguments(PyObject* tuple, Py_ssize_t count) : tuple_(tuple), count_(count) {}

  [[noreturn]] static void refuse(const char* why) {
    PyErr_Format(PyExc_TypeError, "loku_kernels._core: %s", why);
    throw PythonError{};
  }

  PyObject* next() {
    if (next_ >= count_) refuse("there are too few arguments");
    const Py_ssize_t index = next_++;
    return tuple_ ? PyTuple_GetItem(tuple_, index) : items_[index];
  }

  // CPython returns -1 for a failed conversion, and for the number -1.
  template <typename Number>
  static Number checked(Number value) {
    if (value == static_cast<Number>(-1) && PyErr_Occurred()) {
      if (PyErr_ExceptionMatches(PyExc_OverflowError)) refuse("a number is out of range");
      throw PythonError{};
    }
    return value;
  }

  template <typename T, typename Number>
  static T narrowed(Number value) {
    const T result = static_cast<T>(value);
    if (static_cast<Number>(result) != value) refuse("a number is out of range");
    return result;
  }

  PyObject* const* items_ = nullptr;
  PyObject* tuple_ = nullptr;  // instead of `items_`
  Py_ssize_t count_;
  Py_ssize_t next_ = 0;
};

template <>
inline Rows Arguments::read() {
  return read_tuple<Rows, void*, const int64_t*, int64_t, int64_t, int64_t, DType>();
}

template <>
inline Features Arguments::read() {
  return read_tuple<Features, const void*, int64_t, int64_t, int64_t>();
}

template <>
inline MatrixRows Arguments::read() {
  return read_tuple<MatrixRows, const void*, int64_t>();
}

template <>
inline Matrix Arguments::read() {
  return read_tuple<Matrix, float*, int64_t>();
}

template <>
inline Triplets Arguments::read() {
  return {read<double*>(), read<int64_t*>()};
}

template <>
inline Ids Arguments::read() {
  const int64_t* ids = read<const int64_t*>();
  return copy_of(ids, read<int64_t>());
}

template <>
inline Factors Arguments::read() {
  return {read<double>(), read<const double*>()};
}

template <>
inline OnlineStates Arguments::read() {
  return {read<double*>(), read<int64_t*>(), read<float*>(), read<int64_t*>(), read<float*>()};
}

// Other Python threads run meanwhile. The end may throw: in a daemon thread, after the interpreter's end,
// CPython ends the thread there, by unwinding it.
class Unlocked {
 public:
  Unlocked() = default;
  Unlocked(const Unlocked&) = delete;
  ~Unlocked() noexcept(false) { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_ = PyEval_SaveThread();
};

inline PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }

inline PyObject* to_python(const std::string& value) { return PyUnicode_FromString(value.c_str()); }

template <auto kFunction>
struct Call;

template <typename Result, typename... Parameters, Result (*kFunction)(Parameters...)>
struct Call<kFunction> {
  static PyObject* run(PyObject*, PyObject* const* items, Py_ssize_t count) {
    try {
      Arguments arguments(items, count);
      const std::tuple<std::decay_t<Parameters>...> values{arguments.read<std::decay_t<Parameters>>()...};
      arguments.finish();
      const auto unlocked_call = [&values] {
        const Unlocked unlocked;
        return std::apply(kFunction, values);
      };
      if constexpr (std::is_void<Result>::value) {
        unlocked_call();
        return Py_NewRef(Py_None);
      } else {
        return to_python(unlocked_call());
      }
    } catch (const PythonError&) {
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::length_error&) {  // a vector longer than any memory
      PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }
};

template <auto kFunction>
PyMethodDef method(const char* name) {
  const auto any_function = reinterpret_cast<void (*)()>(Call<kFunction>::run);
  return {name, reinterpret_cast<PyCFunction>(any_function), METH_FASTCALL, nullptr};
}

constexpr PyMethodDef kLastMethod = {nullptr, nullptr, 0, nullptr};

}  // namespace loku

// The module `name`, which may be a macro; `fill`, an int (PyObject* module), adds all that is in it and
// returns 0, or -1 with an exception set.
#define LOKU_MODULE(name, fill) LOKU_EXPANDED_MODULE(name, fill)
#define LOKU_EXPANDED_MODULE(name, fill)                                                            \
  PyMODINIT_FUNC PyInit_##name() {                                                                  \
    static PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(fill)}, {0, nullptr}}; \
    static PyModuleDef definition = {                                                               \
        PyModuleDef_HEAD_INIT, #name, nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};       \
    return PyModuleDef_Init(&definition);                                                           \
  }
