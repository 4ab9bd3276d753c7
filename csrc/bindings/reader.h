#pragma once

#include <nanobind/nanobind.h>

namespace dscheck {

void bind_reader(nanobind::module_& module);

}  // namespace dscheck
